"""Compiled blocks train what others do, on engines that gather weights for them and on those that do not."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lori_dist import plugin
from lori_dist.errors import ConfigError
from lori_dist.training.compilation import compile_blocks
from lori_dist.training.data import Batch
from lori_dist.training.engine import State, collect
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import TRAIN, adapt, difference
from tests.models import on_meta, tiny_llama

STEPS = 3


@pytest.fixture(autouse=True)
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles anew, and leaves no process behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


def course(engine: str, layers: int, backend: str | None) -> State:
    """Trained on two rows of one length a step and rank: each size would be compiled."""
    world = from_environment()
    model = adapt(tiny_llama(layers=layers))
    if backend is not None:
        compile_blocks(model, backend=backend)
    made = plugin.find("engines", engine, "build", "engine").load()(*on_meta(model), TRAIN, world, state=None)
    for step in range(STEPS):
        ids = torch.arange(3, 19).view(2, 8) + 7 * step + 16 * world.rank
        batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        made.step([batch], num_targets=world.size * 14, lr=1e-2)
    return collect(made, world)


def both(engines: tuple[str, ...], layers: int, backend: str) -> list[tuple[float, int]]:
    """How far each state is from that without compiling, on rank 0, and how many graphs were made for it."""
    from torch._dynamo.utils import counters

    is_first, found = from_environment().rank == 0, []
    for engine in engines:
        before = counters["stats"]["unique_graphs"]
        plain, compiled = (course(engine, layers, how) for how in (None, backend))
        error = difference(compiled, plain) if is_first else 0.0
        found.append((error, counters["stats"]["unique_graphs"] - before))
    return found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # torch's compiler calls what torch warns of
def test_compiled_blocks_train_what_others_do(backend: str) -> None:
    for found in run_distributed(both, ("ddp", "fsdp"), 1, backend, world_size=2):
        assert all(error <= 1e-5 and num_graphs == 1 for error, num_graphs in found), found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_blocks_share_what_was_compiled() -> None:
    """Of six, the first has an input that needs no gradient, and layers without entries and with all; the second finds
    the sizes fixed, the third finds that they change."""
    [[(error, num_graphs)]] = run_distributed(both, ("ddp",), 6, "aot_eager", world_size=1)
    assert error <= 1e-5
    assert num_graphs == 3


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.compile: compiles transformer blocks, and Linear does not say which"):
        compile_blocks(nn.Linear(2, 2))
