from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lori_dist.benchmarks._traffic import Traffic
from lori_dist.engines.fsdp import build
from lori_dist.training.data import collate
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import PAD, TRAIN, adapt, examples, run
from tests.models import on_meta, tiny_gpt2, tiny_llama


def describe(kind: str) -> tuple[list[str], bool, bool]:
    world = from_environment()
    model = {"llama": tiny_llama, "tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2}[kind]()
    engine: Any = build(*on_meta(adapt(model)), TRAIN, world, state=None)
    groups = [path for path, module in engine.model.named_modules() if isinstance(module, FSDPModule)]
    sharded = all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in engine.model.parameters())
    tied = engine.model.get_input_embeddings().weight is engine.model.get_output_embeddings().weight
    return groups, sharded, tied


@pytest.mark.parametrize(
    ("kind", "blocks", "tied"),
    [
        ("llama", ["", "model.layers.0", "model.layers.1"], False),
        ("tied", ["", "model.layers.0", "model.layers.1"], True),
        ("gpt2", ["", "transformer.h.0", "transformer.h.1"], True),
    ],
)
def test_each_block_is_a_group_and_the_rest_another(kind: str, blocks: list[str], tied: bool) -> None:
    assert run_distributed(describe, kind, world_size=2) == [(blocks, True, tied)] * 2


class Unknown(nn.Module):
    """A model that does not say what its blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)


def shard_unknown() -> None:
    build(*on_meta(adapt_one(Unknown())), TRAIN, from_environment(), state=None)


def adapt_one(model: nn.Module) -> nn.Module:
    from lori_dist.adapter.attach import attach
    from tests.engines.oracle import SPEC

    attach(model, SPEC)
    return model


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"JobError: train.engine: fsdp shards transformer blocks, and Unk"):
        run_distributed(shard_unknown, world_size=1)


def build_with(options: dict[str, Any]) -> None:
    build(*on_meta(adapt(tiny_llama())), TRAIN, from_environment(), state=None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 2}, r"ConfigError: train\.engine\.replicas: got 2 for 1 ranks; give a number"),
        (
            {"base": "replicated", "offload": True},
            r"train\.engine: base is replicated and offload is true, which",
        ),
    ],
    ids=str,
)
def test_placements_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        run_distributed(build_with, options, world_size=1)


def collectives(options: dict[str, Any]) -> tuple[int, int, int]:
    """Calls, and bytes reduced and gathered, of one step."""
    world = from_environment()
    engine: Any = build(*on_meta(adapt(tiny_llama(layers=4))), TRAIN, world, state=None, **options)
    run(engine, world, range(1))
    with Traffic() as traffic:
        run_step(engine, world)
    return traffic.num_calls, traffic.reduced, traffic.gathered


def run_step(engine: Any, world: World) -> None:
    batch = collate(examples()[:2], PAD)
    engine.step([batch], num_targets=10, lr=1e-3)


def test_values_alone_are_sent_once_a_block() -> None:
    values = sum(p.numel() for p in adapt(tiny_llama(layers=4)).parameters() if p.requires_grad)
    for calls, reduced, gathered in run_distributed(collectives, {"base": "replicated"}, world_size=2):
        assert calls == 4 + 4 + 2  # each block gathered and reduced once; norm, loss
        assert 4 * values <= reduced < 4 * values * 1.05 + 8
        assert 4 * values <= gathered < 4 * values * 1.05
