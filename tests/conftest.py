"""What all tests share: an environment of their own, and which tests can run here."""

import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch, ray or transformers are imported, by this process or by one it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A killed build of DeepSpeed's leaves a lock in the user's cache, at which every later start waits for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("LORI_CACHE", str(Path(sys.prefix) / "lori_cache"))
os.environ.setdefault("LORI_CACHE_SIZE", "1GB")

# Shared machines are slow at times, so no example has a deadline; the same examples come in every run.
settings.register_profile("lori", deadline=None, derandomize=True, database=None)
settings.load_profile("lori")


TESTS = Path(__file__).parent

LONG = ("test_launchers", "engines/test_contract", "training/test_train", "plan/test_plan")
"""Files that take longest. They start first, so that no process ends with one of them while the others are idle."""


@functools.cache
def group(file: str) -> str:
    """The group of a file's tests under ``pytest -n``, all of which run in one process: the file, which loads its
    models once; or all files with a Ray cluster, of which a small machine has room for one at a time."""
    if "pytest.mark.ray" in (TESTS.parent / file).read_text():
        return "ray"
    return Path(file).relative_to(TESTS.name).with_suffix("").as_posix()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    return Groups(config, log)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collections go over what tests make, not over the tests and all that was imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(("ray", *LONG))}
        items.sort(key=lambda item: order.get(group(item.nodeid.partition("::")[0]), len(order)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # not above: the tests of the configuration are there before torch is imported

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
