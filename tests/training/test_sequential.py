"""Trainings of tasks one after another, from rows of text to the files."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config, load_adapter
from lori_dist.adapter.adapter import Adapter
from lori_dist.config import Choice, Run
from lori_dist.errors import JobError
from lori_dist.multitask.sequential import plan
from lori_dist.training.masking import taken_by
from lori_dist.training.metrics import Record
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama

TASKS = {"first": "yes", "second": "no", "third": "yes no"}
ENGINES = [
    Choice(name="ddp"),
    Choice(name="fsdp"),
    Choice(name="fsdp", options={"base": "replicated"}),
    *(Choice(name="deepspeed", options={"stage": stage}) for stage in (1, 2, 3)),
]
TOLERANCE = 5e-6
Failed = pytest.fail.Exception


def described(model_folder: Path, place: Path) -> Run:
    tasks = {}
    for name, answer in TASKS.items():
        path = place / f"{name}.jsonl"
        rows = [{"prompt": f"{n} and {n * 7 % 5}: ", "response": f"{answer} {n}"} for n in range(7)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {"train": str(path), "test": str(path)}
    return config.validate(
        {
            "name": "test",
            "output": str(place / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": tasks,
            "adapter": {"rank": 4, "alpha": 8, "density": 0.3, "seed": 3, "share_projection": True},
            # A large eps, or Adam makes steps of the rounding of gradients near zero.
            "train": {"steps": 4, "batch_size": 6, "micro_batch_size": 3, "lr": 2e-2, "eps": 1e-3},
            "multitask": "sequential",
        }
    )


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    return described(model_folder, tmp_path)


@pytest.fixture(scope="module")
def chain(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """The adapters of `disjoint(run)`, trained by one process."""
    return trained(disjoint(described(model_folder, tmp_path_factory.mktemp("chain"))))


def disjoint(run: Run) -> Run:
    return replace(run, multitask=Choice(name="sequential", options={"masks": "disjoint"}))


def train_rank(run: Run, tasks: list[str], die_after: tuple[str, int] | None = None) -> None:
    """As jobs would: each into the folder where the next one looks."""
    jobs = {job.settings["task"]: job for job in plan(run, **run.multitask.options) if job.kind == "train"}

    def watch(record: Record) -> None:
        if (record["phase"], record["step"]) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    for task in tasks:
        job = jobs[task]
        train(
            run,
            task,
            from_environment(),
            run.folder / job.name,
            fingerprint=job.fingerprint,
            progress=watch,
            sequel=job.settings["sequel"],
        )


def trained(run: Run, *, world_size: int = 1) -> dict[str, Adapter]:
    run_distributed(train_rank, run, list(TASKS), world_size=world_size)
    return adapters(run)


def adapters(run: Run) -> dict[str, Adapter]:
    return {task: load_adapter(run.folder / f"train-{task}" / "adapter.safetensors") for task in TASKS}


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([adapter.delta(module).flatten() for module in adapter.shapes])


def content(adapter: Adapter, number: int) -> dict[str, tuple[Tensor | None, Tensor]]:
    return {module: (item.index, item.values) for module, item in adapter.blocks[number].entries.items()}


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    torch.testing.assert_close(dict(found), dict(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("masks", ["independent", "disjoint"])
def test_earlier_entries_stay_bit_for_bit(run: Run, chain: dict[str, Adapter], masks: str) -> None:
    made = trained(run) if masks == "independent" else chain
    for number, adapter in enumerate(made.values(), 1):
        assert [block.name for block in adapter.blocks] == list(TASKS)[:number]
        assert len({block.seed for block in adapter.blocks}) == 1
        for earlier in range(number):
            assert_same(content(adapter, earlier), content(list(made.values())[earlier], earlier))
        total = sum(out_features * 4 for out_features, _ in adapter.shapes.values())
        assert sum(entries.kept for entries in adapter.blocks[-1].entries.values()) == round(0.3 * total)


def test_disjoint_masks_have_no_entry_in_common_and_independent_ones_do(run: Run, chain: dict[str, Adapter]) -> None:
    shared = {}
    for masks, made in {"independent": trained(run), "disjoint": chain}.items():
        last = made["third"]
        union = sum(int(taken_by(last, module).sum()) for module in last.shapes)
        shared[masks] = last.kept - union
    assert shared["disjoint"] == 0
    assert shared["independent"] > 0


def test_without_room_a_mask_is_refused(run: Run) -> None:
    """A third of each module's entries, to one: three such masks are larger than the module."""
    options = {"density": 1 / 3, "mask": Choice(name="per_matrix"), "rank": 1, "targets": ("q_proj",)}
    run = replace(disjoint(run), adapter=replace(run.adapter, **options))  # type: ignore[arg-type]
    size = tiny_llama().config.hidden_size
    if 3 * round(size / 3) <= size:
        run = replace(run, adapter=replace(run.adapter, density=1 / 3, rank=5 if 5 * size % 3 == 2 else 2))
    with pytest.raises(Failed, match=r"adapter\.mask: per_matrix keeps \d+ entries of .* that earlier tasks have"):
        trained(run)


def test_the_next_task_starts_where_the_last_one_ended(run: Run) -> None:
    """Its first loss is that of a model with all entries so far."""
    trained(run)
    records = [json.loads(line) for line in (run.folder / "train-second" / "metrics.jsonl").read_text().splitlines()]
    first = {record["phase"]: record["loss"] for record in reversed(records)}
    alone = replace(run, name="alone")
    run_distributed(train_rank, alone, ["first"], world_size=1)
    job = plan(alone)[1]
    run_distributed(train_fresh, alone, job.fingerprint, world_size=1)
    fresh = json.loads((alone.folder / "fresh" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first["calibrate"] == pytest.approx(first["train"], rel=1e-6)
    assert first["train"] < fresh - 1e-3


def train_fresh(run: Run, fingerprint: str) -> None:
    train(run, "second", from_environment(), run.folder / "fresh", fingerprint=fingerprint)


def test_a_chain_that_was_killed_ends_as_if_it_never_was(run: Run) -> None:
    run = disjoint(replace(run, train=replace(run.train, checkpoint_every=2)))
    whole, again = trained(run), replace(run, name="again")
    for task, moment in (("first", ("train", 3)), ("second", ("calibrate", 3)), ("third", ("train", 3))):
        with pytest.raises(Failed, match="SIGKILL"):
            run_distributed(train_rank, again, [task], moment, world_size=1)
        run_distributed(train_rank, again, [task], world_size=1)
    for task, adapter in adapters(again).items():
        for number in range(len(adapter.blocks)):
            assert_same(content(adapter, number), content(whole[task], number))


@pytest.mark.parametrize(
    "engine",
    [pytest.param(one, marks=() if one in (ENGINES[1], ENGINES[-1]) else pytest.mark.slow) for one in ENGINES],
    ids=lambda engine: f"{engine.name} {engine.options}",
)
def test_two_ranks_give_the_adapters_of_one(run: Run, chain: dict[str, Adapter], engine: Choice) -> None:
    two = trained(disjoint(replace(run, train=replace(run.train, engine=engine))), world_size=2)
    for task in TASKS:
        ours, theirs = flat(two[task]), flat(chain[task])
        assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE


def test_a_task_needs_the_ones_before(run: Run) -> None:
    with pytest.raises(Failed, match="train-first"):
        run_distributed(train_rank, run, ["second"], world_size=1)


def test_lori_train_says_what_is_to_be_trained_first(run: Run) -> None:
    from lori_dist.cluster.launcher import _begin

    with pytest.raises(JobError, match="train-second: needs train-first, which is not finished; train that one first"):
        _begin(run, "second")


def of_pools(run: Run, **options: Any) -> Run:
    """The run with a pool of ranks for each task, of which two are left."""
    form = Choice(name="dac", options={"keep": 2, "weight": 1.0, **options})
    train = replace(run.train, checkpoint_every=2)
    return replace(run, adapter=replace(run.adapter, form=form, density=0.5), train=train)


@pytest.mark.slow
def test_pools_of_ranks_follow_each_other_and_a_chain_that_was_killed_ends_as_if_it_never_was(run: Run) -> None:
    run = of_pools(run)
    whole, again = trained(run), replace(run, name="again")
    for number, adapter in enumerate(whole.values(), 1):
        assert [block.name for block in adapter.blocks] == list(TASKS)[:number]
        for earlier in range(number):
            assert_same(content(adapter, earlier), content(list(whole.values())[earlier], earlier))
        for module, entries in adapter.blocks[-1].entries.items():
            assert entries.dense(adapter.shapes[module][0], 4).any(0).sum() <= 2
    assert all(whole["third"].blocks[number].entries for number in range(3))
    run_distributed(train_rank, again, ["first"], world_size=1)
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_rank, again, ["second"], ("train", 3), world_size=1)
    run_distributed(train_rank, again, ["second"], world_size=1)
    resumed = load_adapter(again.folder / "train-second" / "adapter.safetensors")
    for number in range(2):
        assert_same(content(resumed, number), content(whole["second"], number))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:], ids=lambda engine: f"{engine.name} {engine.options}")
def test_two_ranks_leave_the_pools_of_one(run: Run, engine: Choice) -> None:
    run = of_pools(run, gate="soft")
    one = trained(run)
    two = trained(replace(run, name="two", train=replace(run.train, engine=engine)), world_size=2)
    for task in TASKS:
        ours, theirs = flat(two[task]), flat(one[task])
        assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE
