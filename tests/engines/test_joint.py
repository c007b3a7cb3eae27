"""Tasks trained together, on every engine, give what one process with a backward pass for each task gives."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lori_dist import plugin
from lori_dist.benchmarks._traffic import Traffic
from lori_dist.training.engine import trained
from lori_dist.training.surgery import Conflicts, surgery
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.engines.joint import TASKS, TRAIN, Way, do, one_process, run
from tests.engines.oracle import Course, difference
from tests.models import on_meta

TOLERANCE = 5e-6
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, base replicated": ("fsdp", {"base": "replicated"}),
    "fsdp, offloaded": ("fsdp", {"offload": True}),
    "deepspeed-1": ("deepspeed", {"stage": 1}),
    "deepspeed-2": ("deepspeed", {"stage": 2}),
    "deepspeed-3": ("deepspeed", {"stage": 3}),
}
WAYS = {
    "sparse": Way(),
    "dense, by layer": Way(density=None, granularity="layer"),
    "A trained, by type, in place": Way(density=None, a="trained", granularity="type", projection="in_place"),
    "A trained, mean": Way(density=0.3, a="trained", reduce="mean"),
    "global": Way(granularity="global", density=0.3, a="trained"),
    "plain": Way(balance="none", density=None, a="trained"),
    **{name: Way(balance=name, granularity="global", density=0.3, a="trained") for name in ("nash", "gradnorm")},
}
CASES = [(name, size) for size in (1, 2) for name in ENGINES] + [("fsdp, hybrid", 4), ("ddp", 3)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    courses: dict[str, Course]
    conflicts: dict[str, Conflicts | None]


def train_all(name: str) -> Outcome:
    world = from_environment()
    courses, conflicts = {}, {}
    for title, way in WAYS.items():
        engine, options = ENGINES.get(name, ("fsdp", {"replicas": 2}))
        model, weights = on_meta(way.model())
        build = plugin.find("engines", engine, "build", "train.engine").load()
        made = build(model, weights, TRAIN, world, state=None, **options)
        tasks = way.surgery(model, world)
        courses[title] = run(made, tasks, world)
        conflicts[title] = None if tasks is None else tasks.conflicts
    return Outcome(courses=courses, conflicts=conflicts)


def count_bytes(name: str) -> tuple[int, int, int, int]:
    """Of a second step: reduced, gathered, what the conflicts say, and entries that are trained."""
    world = from_environment()
    way = Way()
    model, weights = on_meta(way.model())
    num_values = sum(parameter.numel() for parameter in trained(model).values())
    engine, options = ENGINES[name]
    made = plugin.find("engines", engine, "build", "train.engine").load()(
        model, weights, TRAIN, world, state=None, **options
    )
    tasks = surgery(model, TASKS, world)
    do(made, tasks, world, [0])
    with Traffic() as traffic:
        do(made, tasks, world, [1])
    assert tasks.conflicts is not None
    return traffic.reduced, traffic.gathered, tasks.conflicts.sent_bytes, num_values


@pytest.mark.parametrize("name", ["ddp", "fsdp, base replicated", "deepspeed-2"])
def test_ranks_send_summed_gradients_once_and_inner_products(name: str) -> None:
    """And nothing that the engine would send of gradients: not their sum, and not what was projected of others."""
    reduced, gathered, counted, num_values = run_distributed(count_bytes, name, world_size=2)[0]
    num_tasks, num_matrices = len(TASKS), 13
    summed, products = 4 * num_tasks * num_values, 8 * num_matrices * num_tasks * (num_tasks + 1) // 2
    few = 64  # losses, a norm, entries that make shards equal
    assert summed + products <= reduced <= summed + products + few * 16
    if name == "ddp":
        assert 4 * num_values <= gathered <= 4 * num_values + few
        assert reduced + gathered - few <= counted <= reduced + gathered
    else:
        assert reduced - few <= counted <= reduced  # what is gathered are values, as without tasks


@pytest.fixture(scope="module")
def references() -> dict[str, Course]:
    return {title: one_process(way) for title, way in WAYS.items()}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} on {case[1]}")
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    name, size = request.param
    return run_distributed(train_all, name, world_size=size)


@pytest.mark.parametrize("title", WAYS)
def test_weights_and_moments_are_those_of_one_process(
    outcomes: list[Outcome], references: dict[str, Course], title: str
) -> None:
    found, wanted = outcomes[0].courses[title], references[title]
    assert difference(found.state, wanted.state) < TOLERANCE
    for ours, theirs in zip(found.results, wanted.results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.task_losses == pytest.approx(theirs.task_losses, rel=1e-5)


def without_bytes(conflicts: Conflicts | None) -> Conflicts | None:
    """Of hybrid shards, ranks hold unequal ones."""
    return None if conflicts is None else replace(conflicts, sent_bytes=0)


def test_all_ranks_see_the_same_conflicts(outcomes: list[Outcome]) -> None:
    for outcome in outcomes[1:]:
        for title, conflicts in outcome.conflicts.items():
            assert without_bytes(conflicts) == without_bytes(outcomes[0].conflicts[title])
        assert [c.results for c in outcome.courses.values()] == [c.results for c in outcomes[0].courses.values()]
    for title, way in WAYS.items():
        conflicts = outcomes[0].conflicts[title]
        if way.balance != "none":
            assert conflicts is not None
            assert max(conflicts.shares.values()) > 0
            assert conflicts.removed > 0
