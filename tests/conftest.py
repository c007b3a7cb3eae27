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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        share_out(items)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # not above: the tests of the configuration are there before torch is imported

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


# The files that take longest start first, so that no process ends with one of them while the others are idle.
LONG = ("test_launchers", "test_readme", "engines/test_contract", "training/test_train", "test_cli", "plan/test_plan")


def share_out(items: list[pytest.Item]) -> None:
    """Groups the tests for ``pytest -n``: a file stays in one process, which loads its models once.

    Tests that start a Ray cluster share one group: a small machine has no room for two clusters at a time.
    """
    tests = Path(__file__).parent

    def group(item: pytest.Item) -> str:
        return "ray" if item.get_closest_marker("ray") else item.path.relative_to(tests).with_suffix("").as_posix()

    order = {name: place for place, name in enumerate(("ray", *LONG))}
    items.sort(key=lambda item: order.get(group(item), len(order)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
