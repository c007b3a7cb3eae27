from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.benchmarks._methods import is_adapted
from lori_dist.benchmarks._traffic import Traffic, saved_bytes
from lori_dist.engines.ddp import build
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import TRAIN, adapt, run
from tests.models import on_meta, tiny_llama

TOKENS, IN, OUT, RANK = 6, 40, 30, 4


def send() -> tuple[int, int, int]:
    world = from_environment()
    tensor = torch.ones(10)
    parts = [torch.empty(10) for _ in range(world.size)]
    with Traffic() as traffic:
        dist.all_reduce(tensor)
        dist.all_gather(parts, tensor)
        dist.all_gather_into_tensor(torch.empty(10 * world.size), tensor)
        dist.reduce_scatter_tensor(torch.empty(10), torch.ones(10 * world.size))
        dist.broadcast(tensor.double(), src=0)
    dist.all_reduce(tensor)  # outside
    return traffic.reduced, traffic.gathered, traffic.num_calls


@pytest.mark.filterwarnings(
    r"ignore:`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
)
def test_every_collective_counts_the_whole_tensor() -> None:
    assert run_distributed(send, world_size=2) == [(40 + 80, 80 + 80 + 80, 5)] * 2


def train() -> tuple[int, int]:
    """Bytes that DDP's own C++ code reduces in a step, and those of the values."""
    world = from_environment()
    engine: Any = build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=None)
    run(engine, world, range(1))  # buckets are made anew after the first
    with Traffic() as traffic:
        run(engine, world, range(1, 2))
    return traffic.reduced, 4 * sum(p.numel() for p in engine.parameters.values())


def test_what_a_library_sends_from_its_own_code_is_counted_too() -> None:
    for reduced, values in run_distributed(train, world_size=2):
        assert reduced == values + 4  # the loss


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_what_layers_and_model_keep_is_told_apart() -> None:
    model = Model()
    attach(model, Spec(rank=RANK, alpha=1.0, seed=0))
    with saved_bytes(model, is_adapted) as saved:
        output = model(torch.ones(TOKENS, IN, requires_grad=True))
    assert saved.layer_bytes == 2 * 4 * TOKENS * RANK  # A x of both layers
    assert saved.model_bytes == saved.layer_bytes + 4 * TOKENS * OUT  # and what relu keeps
    output.sum().backward()


def test_lora_keeps_its_input() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=RANK, target_modules=["first"], lora_dropout=0.0))
    with saved_bytes(model, is_adapted) as saved:
        model(torch.ones(TOKENS, IN, requires_grad=True))
    assert saved.layer_bytes == 4 * TOKENS * (IN + RANK)
