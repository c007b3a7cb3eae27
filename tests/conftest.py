"""What all tests share: an environment of their own, and which tests can run here."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch, ray or transformers are imported, by this process or by one it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A killed build of DeepSpeed's leaves a lock in the user's cache, at which every later start waits for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["HF_HUB_OFFLINE"] = "1"

# Shared machines are slow at times, so no example has a deadline; the same examples come in every run.
settings.register_profile("lori", deadline=None, derandomize=True, database=None)
settings.load_profile("lori")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # not above: the tests of the configuration are there before torch is imported

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
