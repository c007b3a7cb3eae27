from typing import Any

import torch

from lori_dist.engines.ddp import build
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import TRAIN, adapt, run
from tests.models import on_meta, tiny_llama


def train_with_own_projection() -> float:
    """Rank 1 gets an A of its own, which nothing may replace with that of rank 0."""
    world = from_environment()
    model: Any = adapt(tiny_llama())
    a = model.model.layers[0].mlp.up_proj.deltas[0].projection
    a.fill_(world.rank)
    engine = build(*on_meta(model), TRAIN, world, state=None)
    run(engine, world, range(2))
    return float(a.mean())


def test_nothing_but_gradients_is_sent() -> None:
    assert run_distributed(train_with_own_projection, world_size=2) == [0.0, 1.0]


def size_of_gradients() -> tuple[int, int]:
    world = from_environment()
    engine = build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=None)
    held = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    return held, sum(len(kept) for kept in engine.optimizer.state.values())


def test_only_values_are_trained() -> None:
    num_values = sum(p.numel() for p in adapt(tiny_llama()).parameters() if p.requires_grad)
    assert torch.tensor(run_distributed(size_of_gradients, world_size=1)).tolist() == [[num_values, 3 * 13]]
