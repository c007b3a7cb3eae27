"""The loops in configs/examples, on two ranks: what they leave is what one process leaves."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import load_adapter
from tests.adapter.loops import quiet_deepspeed
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "examples"
MODEL, ROWS = ROOT / "configs" / "quickstart" / "model", ROOT / "configs" / "quickstart" / "data"
TOLERANCE = 5e-6


def example(name: str, out: str) -> None:
    with quiet_deepspeed():
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(str(MODEL), str(ROWS / "arithmetic.train.jsonl"), out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "adapter.safetensors"
    run_distributed(example, "fsdp2_loop", str(out), world_size=1)
    return out


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_gives_what_one_process_does(name: str, alone: Path, tmp_path: Path) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80
    out = tmp_path / "adapter.safetensors"
    run_distributed(example, name, str(out), world_size=2)
    found, wanted = load_adapter(out), load_adapter(alone)
    assert found.kept == wanted.kept > 0
    entries = [[adapter.blocks[0].entries[path] for path in wanted.blocks[0].entries] for adapter in (found, wanted)]
    assert all(
        torch.equal(one.index, other.index) for one, other in zip(*entries, strict=True) if one.index is not None
    )
    x, y = (torch.cat([one.values for one in of_adapter]) for of_adapter in entries)
    assert (x - y).norm() / y.norm() < TOLERANCE
