from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lori_dist.benchmarks._traffic import Traffic
from lori_dist.engines.fsdp import build
from lori_dist.training.data import collate
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.engines.oracle import PAD, TRAIN, Course, adapt, difference, examples, one_process, run
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
        ({"reshard_after_forward": 3}, r"train\.engine\.reshard_after_forward: got 3 for 1 ranks that share a base"),
        ({"pin_memory": False}, r"train\.engine\.pin_memory: got False, which is for offload: true"),
        (
            {"wrap": ["LlamaMLPs"]},
            r"train\.engine\.wrap: no module of LlamaForCausalLM is a LlamaMLPs.*Did you mean 'LlamaMLP'",
        ),
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


# --- what users tune -------------------------------------------------------------------------------------------------

TUNED: dict[str, dict[str, Any]] = {
    "usual": {},
    "kept": {"reshard_after_forward": False},
    "two of four": {"reshard_after_forward": 2},
    "ahead": {"forward_prefetch": 1, "backward_prefetch": 2},
    "classes": {"wrap": ["LlamaMLP", "LlamaAttention"], "backward_prefetch": 3},
    "nested": {"wrap": ["LlamaMLP", "LlamaDecoderLayer"]},
    "float32": {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"},
    "half": {"param_dtype": "bfloat16"},
    "half, summed in full": {"param_dtype": "bfloat16", "reduce_dtype": "float32"},
    "half out": {"output_dtype": "bfloat16"},
    "replicated, freed": {"base": "replicated", "reshard_after_forward": True},
    "on the host": {"offload": True, "pin_memory": False, "reshard_after_forward": False},
}
ROUNDED = ("half", "half, summed in full", "half out")
"""Where the mathematics is not that of one process in float32."""


class Tuned(NamedTuple):
    """What one rank sees of an engine."""

    course: Course
    groups: list[str]
    gathered: int
    reduced: int
    ahead: tuple[list[int], list[int]]
    """How many groups each one prefetches in the forward and in the backward pass."""
    shards: set[torch.dtype]
    out: torch.dtype


def tuned() -> dict[str, Tuned]:
    world = from_environment()
    found = {}
    for name, options in TUNED.items():
        engine: Any = build(*on_meta(adapt(tiny_llama())), TRAIN, world, state=None, **options)
        course = run(engine, world, range(6))
        with Traffic() as traffic:
            run_step(engine, world)
        groups = {path: module for path, module in engine.model.named_modules() if isinstance(module, FSDPModule)}
        states = [module._get_fsdp_state() for module in groups.values()]
        ids = torch.ones(1, 3, dtype=torch.int64)
        found[name] = Tuned(
            course=course,
            groups=list(groups),
            gathered=traffic.gathered,
            reduced=traffic.reduced,
            ahead=(
                [len(state._states_to_forward_prefetch) for state in states],
                [len(state._states_to_backward_prefetch) for state in states],
            ),
            shards={parameter.dtype for parameter in engine.model.parameters()},
            out=engine.model(input_ids=ids, use_cache=False).logits.dtype,
        )
    return found


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Tuned]]:
    return run_distributed(tuned, world_size=4)


@pytest.mark.parametrize("name", [name for name in TUNED if name not in ROUNDED])
def test_tuned_engines_give_what_one_process_gives(name: str, of_ranks: list[dict[str, Tuned]]) -> None:
    assert difference(of_ranks[0][name].course.state, one_process(adapt(tiny_llama()), 6).state) < 5e-6


@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_is_near_and_shards_stay_float32(name: str, of_ranks: list[dict[str, Tuned]]) -> None:
    found, wanted = of_ranks[0][name], one_process(adapt(tiny_llama()), 6)
    assert found.shards == {torch.float32}
    assert found.course.results != of_ranks[0]["usual"].course.results
    for one, other in zip(found.course.results, wanted.results, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-2)
    assert found.out == torch.bfloat16 and of_ranks[0]["usual"].out == torch.float32


def test_what_is_tuned_reaches_torch(of_ranks: list[dict[str, Tuned]]) -> None:
    model = tiny_llama()
    base = 4 * sum(parameter.numel() for parameter in model.parameters())
    blocks = 4 * sum(parameter.numel() for parameter in model.model.layers.parameters())
    for found in of_ranks:
        usual = found["usual"]
        # Without resharding blocks are gathered once; with it among two ranks, the second time half as much is made
        # twice, of which a rank sees all.
        assert usual.gathered - found["kept"].gathered == pytest.approx(blocks, rel=0.1)
        assert found["on the host"].gathered == found["kept"].gathered
        assert found["two of four"].gathered == pytest.approx(usual.gathered, rel=0.1)
        assert found["replicated, freed"].gathered < 0.3 * base
        assert found["half"].gathered == pytest.approx(usual.gathered / 2, rel=0.05)
        assert found["half"].reduced < 0.7 * found["half, summed in full"].reduced
        assert found["classes"].groups == [
            "",
            *(f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")),
        ]
        assert found["nested"].groups == [
            "",
            *(path for i in range(2) for path in (f"model.layers.{i}", f"model.layers.{i}.mlp")),
        ]
        assert usual.ahead == ([0, 0, 0], [0, 0, 0])
        assert found["ahead"].ahead == ([0, 1, 0], [0, 0, 1])
        assert found["classes"].ahead == ([0] * 5, [0, 0, 1, 2, 3])
