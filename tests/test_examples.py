"""The loops in configs/examples, on two ranks: what they leave is what one process leaves."""

import functools
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import load_adapter
from tests.adapter.loops import as_launched_by_accelerate, quiet_deepspeed
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "examples"
MODEL, ROWS = ROOT / "configs" / "quickstart" / "model", ROOT / "configs" / "quickstart" / "data"
TOLERANCE = 5e-6
DEEPSPEED = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
}


def example(name: str, how: str, out: str) -> None:
    """how: of accelerate and the Trainer, what shards the model."""
    as_launched_by_accelerate(how if name == "accelerate_loop" else "")
    more = []
    if name == "trainer" and how:
        more = [str(Path(out).with_suffix(".json"))]
        Path(more[0]).write_text(json.dumps(DEEPSPEED))
    with quiet_deepspeed():
        for text in ("'pin_memory' argument", "Was asked to gather along", "Could not find a config file"):
            warnings.filterwarnings("ignore", message=text, category=UserWarning)
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.STEPS = 3  # of a phase, so that the tests are short
        module.main(str(MODEL), str(ROWS / "arithmetic.train.jsonl"), out, *more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The adapter that one process leaves, by example; that of a loop of one's own is one for all of these."""

    @functools.cache
    def made(name: str) -> Path:
        out = tmp_path_factory.mktemp("alone") / f"{name}.safetensors"
        run_distributed(example, name, "", str(out), world_size=1)
        return out

    return lambda name: made("fsdp2_loop" if name.endswith("_loop") else name)


HOW = {"accelerate_loop": ("", "fsdp2", "2", "3"), "trainer": ("", "3")}
CASES = [
    (path.stem, how)
    for path in sorted(EXAMPLES.glob("*.py"))
    for how in HOW.get(path.stem, ("",))
    if path.stem != "several_adapters"  # which leaves several
]
LONG = [("accelerate_loop", "2"), ("accelerate_loop", "fsdp2")]


@pytest.mark.parametrize(
    ("name", "how"), [pytest.param(*case, marks=pytest.mark.slow if case in LONG else ()) for case in CASES]
)
def test_an_example_gives_what_one_process_does(
    name: str, how: str, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80
    out = tmp_path / "adapter.safetensors"
    run_distributed(example, name, how, str(out), world_size=2)
    assert_same(out, alone(name))


def assert_same(out: Path, wanted_at: Path) -> None:
    found, wanted = load_adapter(out), load_adapter(wanted_at)
    assert found.kept == wanted.kept > 0
    entries = [[adapter.blocks[0].entries[path] for path in wanted.blocks[0].entries] for adapter in (found, wanted)]
    assert all(
        torch.equal(one.index, other.index) for one, other in zip(*entries, strict=True) if one.index is not None
    )
    x, y = (torch.cat([one.values for one in of_adapter]) for of_adapter in entries)
    assert (x - y).norm() / y.norm() < TOLERANCE, float((x - y).norm() / y.norm())


def several(out: str, *rows: str) -> None:
    module: Any = importlib.import_module("configs.examples.several_adapters")
    module.STEPS = 3
    module.main(str(MODEL), out, *rows)


def test_adapters_that_are_trained_together_are_those_of_loops_of_their_own(
    alone: Callable[[str], Path], tmp_path: Path
) -> None:
    assert len((EXAMPLES / "several_adapters.py").read_text().splitlines()) <= 80
    rows = [str(ROWS / f"{task}.train.jsonl") for task in ("arithmetic", "programs")]
    run_distributed(several, str(tmp_path), *rows, world_size=2)
    assert_same(tmp_path / "arithmetic.safetensors", alone("fsdp2_loop"))
    assert load_adapter(tmp_path / "programs.safetensors").blocks[0].seed == 2
