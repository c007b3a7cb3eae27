"""Every engine, on 1, 2 and 4 ranks, is the one asked for and gives what one process gives."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lori_dist import plugin
from lori_dist.config import Train
from lori_dist.training.engine import QUANTITIES, Engine, Part, State, collect
from lori_dist.training.quantized import quantize_layers
from lori_dist.training.trainer import checkpoint_activations
from lori_dist.training.world import World, from_environment, from_first
from tests.distributed import run_distributed
from tests.engines.oracle import TRAIN, Course, adapt, difference, one_process, run
from tests.models import on_meta, tiny, tiny_gpt2, tiny_llama

TOLERANCE = 5e-6
HALF = 3
"""Steps after which a training is resumed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An engine with its options, and what of the model each rank should hold."""

    name: str
    options: Mapping[str, Any]
    shards_base: bool
    shards_moments: bool
    replicas: int = 1
    """Copies of what is sharded."""
    world_sizes: tuple[int, ...] = (1, 2, 4)


def fsdp(**options: Any) -> Asked:
    shards_base = options.get("base") != "replicated"
    return Asked(name="fsdp", options=options, shards_base=shards_base, shards_moments=True)


def deepspeed(stage: int, **options: Any) -> Asked:
    return Asked(name="deepspeed", options={"stage": stage, **options}, shards_base=stage == 3, shards_moments=True)


ENGINES = {
    "ddp": Asked(name="ddp", options={}, shards_base=False, shards_moments=False),
    "fsdp": fsdp(),
    "fsdp, base replicated": fsdp(base="replicated"),
    "fsdp, hybrid": replace(fsdp(replicas=2), replicas=2, world_sizes=(2, 4)),
    "fsdp, offloaded": replace(fsdp(offload=True), world_sizes=(2,)),
    "deepspeed-1": deepspeed(1),
    "deepspeed-2": deepspeed(2),
    "deepspeed-3": deepspeed(3),
    "deepspeed-3, hpz": replace(deepspeed(3, hpz=2), world_sizes=(2, 4)),
    "deepspeed-3, offloaded": replace(deepspeed(3, offload=True), world_sizes=(2,)),
}


CASES = [(name, size) for size in (1, 2, 4) for name, asked in ENGINES.items() if size in asked.world_sizes]
GROUPED = ("fsdp, hybrid", "deepspeed-3, hpz")


def quantized(kind: Literal["nf4", "int8"]) -> Any:
    model = tiny_llama()
    quantize_layers(model, kind)
    return model


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to train, and how."""

    model: Callable[[], Any]
    num_steps: int = 2
    clip: float | None = TRAIN.clip
    checkpointed: bool = False

    def build(self) -> Any:
        model = self.model()
        if self.checkpointed:
            checkpoint_activations(model)
        return model

    def reference(self, num_steps: int) -> Course:
        return one_process(self.model(), num_steps, clip=self.clip)

    @property
    def train(self) -> Train:
        return replace(TRAIN, clip=self.clip)


LLAMA = Variant(model=lambda: adapt(tiny_llama()), num_steps=6)
HALVED = Variant(model=lambda: adapt(tiny_llama().to(torch.bfloat16)))
VARIANTS = {
    "llama": LLAMA,
    "tied, unclipped": Variant(model=lambda: adapt(tiny_llama(tied=True)), clip=None),
    "checkpointed": Variant(model=lambda: adapt(tiny_llama()), checkpointed=True),
    "gpt2": Variant(model=lambda: adapt(tiny_gpt2())),
    "norm": Variant(model=lambda: adapt(tiny_llama(), modules_to_save=("model.norm", "layers.1.self_attn.o_proj"))),
    "nf4": Variant(model=lambda: adapt(quantized("nf4"))),
    "int8": Variant(model=lambda: adapt(quantized("int8"))),
    "mixture": Variant(model=lambda: adapt(tiny("mixtral"))),
    "one entry": Variant(model=lambda: adapt(tiny_llama(), kept=1)),
    "three entries": Variant(model=lambda: adapt(tiny_llama(), kept=3)),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank saw."""

    engine: str
    """Of ENGINES, by the classes of what was built."""
    base_held: float
    """Share of the base that is on this rank."""
    moments_held: float
    """Share of Adam's moments that is on this rank."""
    held: dict[str, dict[str, Part]]
    """Of llama at the end, by quantity."""
    start: State
    """Of llama, before the first step."""
    middle: State
    """After HALF of its steps."""
    courses: dict[str, Course]
    """By variant."""
    resumed: Course
    """The rest of llama in a new engine, from `middle`."""
    ported: Course
    """The rest of llama, from what one process had after the first half."""
    loaded: State
    """What that engine had before its first step."""
    halved: Course
    """In half precision."""
    base_dtypes: set[torch.dtype]
    value_dtypes: set[torch.dtype]


def train_all(asked: Asked, halfway: State) -> Outcome:
    world = from_environment()
    engine = _build(asked, LLAMA, world)
    num_base = sum(p.numel() for p in tiny_llama().parameters())
    num_values = sum(values.numel() for values in halfway.values.values())
    start = collect(engine, world)
    first = run(engine, world, range(HALF))
    rest = run(engine, world, range(HALF, LLAMA.num_steps))
    courses = {"llama": Course(results=first.results + rest.results, state=rest.state)}
    base_held, moments_held = _held(engine)
    held = {quantity: {path: _copy(part) for path, part in engine.parts(quantity).items()} for quantity in QUANTITIES}
    middle = from_first(world, lambda: first.state)
    resumed = run(_build(asked, LLAMA, world, middle), world, range(HALF, LLAMA.num_steps))
    porting = _build(asked, LLAMA, world, halfway)
    loaded = collect(porting, world)
    ported = run(porting, world, range(HALF, LLAMA.num_steps))
    for name, variant in VARIANTS.items():
        if variant is not LLAMA:
            courses[name] = run(_build(asked, variant, world), world, range(variant.num_steps))
    halving = _build(asked, HALVED, world)
    return Outcome(
        engine=_kind(engine),
        base_held=base_held / num_base,
        moments_held=moments_held / num_values,
        held=held,
        start=start,
        middle=first.state,
        courses=courses,
        resumed=resumed,
        ported=ported,
        loaded=loaded,
        halved=run(halving, world, range(HALVED.num_steps)),
        base_dtypes={p.dtype for p in halving.model.parameters() if not p.requires_grad},
        value_dtypes={p.dtype for p in halving.model.parameters() if p.requires_grad},
    )


def _build(asked: Asked, variant: Variant, world: World, state: State | None = None) -> Engine:
    build = plugin.find("engines", asked.name, "build", "train.engine").load()
    model, weights = on_meta(variant.build())
    engine: Engine = build(model, weights, variant.train, world, state=state, **asked.options)
    return engine


def _kind(engine: Engine) -> str:
    model: Any = engine.model
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    if isinstance(model, FSDPModule):
        assert isinstance(model, nn.Module)
        sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        if {id(parameter) for parameter in sharded} == {id(p) for p in model.parameters() if p.requires_grad}:
            return "fsdp, base replicated"
        if len(sharded) < len(list(model.parameters())):
            return "fsdp, in part"
        if any(parameter.device_mesh.ndim == 2 for parameter in sharded):
            return "fsdp, hybrid"
        group = model._get_fsdp_state()._fsdp_param_group
        return "fsdp, offloaded" if isinstance(group.offload_policy, CPUOffloadPolicy) else "fsdp"
    if isinstance(model, DeepSpeedEngine):
        if isinstance(model.optimizer, DeepSpeedZeroOptimizer_Stage3):
            if any(parameter.ds_secondary_tensor is not None for parameter in model.parameters()):
                return "deepspeed-3, hpz"
            return "deepspeed-3, offloaded" if model.optimizer.offload_param else "deepspeed-3"
        if isinstance(model.optimizer, DeepSpeedZeroOptimizer):
            return "deepspeed-2" if model.optimizer.partition_gradients else "deepspeed-1"
    return type(model).__name__


def _held(engine: Any) -> tuple[int, int]:
    """Entries of the base, and of Adam's first moments, in this rank's memory."""
    base = [parameter for parameter in engine.model.parameters() if not parameter.requires_grad]
    moments = [kept["exp_avg"] for kept in engine.optimizer.state.values()]
    return sum(map(_num_local, base)), sum(map(_num_local, moments))


def _copy(part: Part) -> Part:
    return Part(start=part.start, data=part.data.cpu().clone())


def _num_local(tensor: Any) -> int:
    if isinstance(tensor, DTensor):
        return tensor.to_local().numel()
    return int(tensor.ds_tensor.numel() if hasattr(tensor, "ds_tensor") else tensor.numel())


# --- what one process gives ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references() -> dict[str, Course]:
    return {name: variant.reference(variant.num_steps) for name, variant in VARIANTS.items()}


@pytest.fixture(scope="module")
def halfway() -> State:
    return LLAMA.reference(HALF).state


@pytest.fixture(
    scope="module",
    # On four ranks, in the fast tests, those whose ranks are in two groups.
    params=[
        pytest.param(case, marks=pytest.mark.slow if case[1] == 4 and case[0] not in GROUPED else ()) for case in CASES
    ],
    ids=str,
)
def case(request: pytest.FixtureRequest, halfway: State) -> tuple[str, int, list[Outcome]]:
    """One gang of ranks does all that the tests below look at."""
    name, world_size = request.param
    return name, world_size, run_distributed(train_all, ENGINES[name], halfway, world_size=world_size)


Case = tuple[str, int, list[Outcome]]


def test_every_engine_is_tested() -> None:
    assert {asked.name for asked in ENGINES.values()} == set(plugin.names("engines"))


def test_the_engine_is_the_one_asked_for(case: Case) -> None:
    name, _, outcomes = case
    assert [outcome.engine for outcome in outcomes] == [name] * len(outcomes)


def test_each_rank_holds_its_share(case: Case) -> None:
    name, world_size, outcomes = case
    asked = ENGINES[name]
    share = asked.replicas / world_size
    for outcome in outcomes:
        assert outcome.base_held == pytest.approx(share if asked.shards_base else 1, abs=0.05)
        assert outcome.moments_held == pytest.approx(share if asked.shards_moments else 1, abs=0.06)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_moments_are_those_of_one_process(
    case: Case, references: dict[str, Course], variant: str, record_property: Callable[[str, object], None]
) -> None:
    _, _, outcomes = case
    error = difference(outcomes[0].courses[variant].state, references[variant].state)
    record_property("error", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_norms_are_those_of_the_global_batch(
    case: Case, references: dict[str, Course], variant: str
) -> None:
    for outcome in case[2]:
        for found, wanted in zip(outcome.courses[variant].results, references[variant].results, strict=True):
            assert found.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=TOLERANCE)


def test_all_ranks_see_the_same_losses_and_norms(case: Case) -> None:
    first, *others = case[2]
    for other in others:
        for variant in VARIANTS:
            assert other.courses[variant].results == first.courses[variant].results


def test_the_state_is_what_the_ranks_hold(case: Case) -> None:
    _, _, outcomes = case
    state = outcomes[0].courses["llama"].state
    for quantity in QUANTITIES:
        for path, full in getattr(state, quantity).items():
            seen = torch.zeros(full.numel(), dtype=torch.bool)
            for outcome in outcomes:
                part = outcome.held[quantity][path]
                end = part.start + part.data.numel()
                assert torch.equal(part.data, full[part.start : end])
                seen[part.start : end] = True
            assert seen.all()


def test_only_the_first_rank_gathers(case: Case) -> None:
    for outcome in case[2][1:]:
        for state in (outcome.courses["llama"].state, outcome.start, outcome.loaded):
            assert not state.values and not state.exp_avg and not state.exp_avg_sq


def test_training_starts_from_zero(case: Case) -> None:
    start = case[2][0].start
    assert start.step == 0
    for part in (start.values, start.exp_avg, start.exp_avg_sq):
        assert all(not tensor.any() for tensor in part.values())


def test_a_resumed_training_is_the_same_bit_for_bit(case: Case) -> None:
    outcome = case[2][0]
    assert outcome.middle.step == HALF
    assert outcome.resumed.state.step == LLAMA.num_steps
    assert outcome.resumed.results == outcome.courses["llama"].results[HALF:]
    assert_equal(outcome.resumed.state, outcome.courses["llama"].state)


def test_a_state_goes_in_and_out_unchanged(case: Case, halfway: State) -> None:
    assert_equal(case[2][0].loaded, halfway)


def test_a_training_goes_on_from_another_engine_s_state(
    case: Case, halfway: State, references: dict[str, Course]
) -> None:
    outcome = case[2][0]
    assert difference(outcome.middle, halfway) < TOLERANCE
    assert difference(outcome.ported.state, references["llama"].state) < TOLERANCE


def test_values_stay_fp32_on_a_base_in_half_precision(case: Case) -> None:
    for outcome in case[2]:
        assert outcome.base_dtypes == {torch.bfloat16}
        assert outcome.value_dtypes == {torch.float32}
    halved = case[2][0].halved.state.values
    assert all(values.dtype == torch.float32 and values.any() for values in halved.values())


def test_half_precision_follows_full_precision(case: Case, references: dict[str, Course]) -> None:
    for found, wanted in zip(case[2][0].halved.results, references["llama"].results, strict=False):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-2)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=5e-2)


def live_bytes(asked: Asked) -> tuple[int, int]:
    """Of all tensors: while an engine trains, and after it was closed; less what there was before."""

    def count() -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        local = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]  # their parts are among these
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
        return sum(storages.values())

    world = from_environment()
    before = count()
    engine = _build(asked, LLAMA, world)
    run(engine, world, range(1))
    training = count() - before
    engine.close()
    del engine
    return training, count() - before


@pytest.mark.parametrize("name", [name for name, asked in ENGINES.items() if 1 in asked.world_sizes])
def test_a_closed_engine_leaves_no_model_behind(name: str) -> None:
    [(training, after)] = run_distributed(live_bytes, ENGINES[name], world_size=1)
    assert training > 4 * sum(parameter.numel() for parameter in tiny_llama().parameters()) * 0.9
    assert after < 0.1 * training


def assert_equal(state: State, other: State) -> None:
    assert state.step == other.step
    for part in ("values", "exp_avg", "exp_avg_sq"):
        found, wanted = getattr(state, part), getattr(other, part)
        assert list(found) == list(wanted)
        for path in found:
            assert found[path].dtype == torch.float32
            assert torch.equal(found[path], wanted[path]), f"{part} of {path}"
