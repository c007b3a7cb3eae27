"""The training of one adapter on several tasks, from rows of text to the file."""

import json
import os
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist import attach, config, load_adapter, load_tasks
from lori_dist.adapter.adapter import Adapter
from lori_dist.config import Choice, Run
from lori_dist.evaluation import evaluate
from lori_dist.multitask.joint import plan
from lori_dist.training.joint import counts_in_batch, joint, rows_of_step, shares_of
from lori_dist.training.metrics import Record
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama

STEPS, EVERY = 6, 2
Failed = pytest.fail.Exception


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    """Three tasks of unequal size that answer the same prompts differently."""
    tasks = {}
    for number, (name, answer) in enumerate({"more": "yes", "less": "no", "both": "yes no"}.items()):
        rows = [{"prompt": f"{n} and {n * 7 % 5}: ", "response": f"{answer} {n}"} for n in range(5 + 4 * number)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {"train": str(path), "test": str(path)}
    return config.validate(
        {
            "name": "test",
            "output": str(tmp_path / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": tasks,
            "adapter": {"rank": 4, "alpha": 8, "density": 0.2, "seed": 3},
            "train": {
                "steps": STEPS,
                "batch_size": 7,
                "micro_batch_size": 3,
                "lr": 5e-3,
                "clip": 0.5,
                "checkpoint_every": EVERY,
                "calibrate": {"steps": 3},
            },
            "multitask": {"name": "joint", "weights": {"less": 2.0}},
        }
    )


def changed(run: Run, *, multitask: Mapping[str, Any] | None = None, projection: str = "cached", **train: Any) -> Run:
    options = {**run.multitask.options, **(multitask or {})}
    return replace(
        run,
        train=replace(run.train, **train),
        adapter=replace(run.adapter, projection=projection),  # type: ignore[arg-type]
        multitask=Choice(name="joint", options=options),
    )


def train_rank(run: Run, folder: Path, die_after: tuple[str, int] | None = None) -> tuple[dict[str, Any], list[Record]]:
    job = plan(run, **run.multitask.options)[0]
    records: list[Record] = []

    def watch(record: Record) -> None:
        records.append(record)
        if (record["phase"], record["step"]) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    joint, name = job.settings["joint"], job.settings["task"]
    summary = train(run, name, from_environment(), folder, fingerprint="f", progress=watch, joint=joint)
    return summary, records


def trained(run: Run, folder: Path, *, world_size: int = 1) -> tuple[dict[str, Any], list[Record]]:
    found: tuple[dict[str, Any], list[Record]] = run_distributed(train_rank, run, folder, world_size=world_size)[0]
    return found


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([adapter.delta(module).flatten() for module in adapter.shapes])


MEASURED = ("seconds", "tokens_per_second", "mfu", "memory", "data_wait", "time")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in found]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 20), st.integers(0, 30))
def test_every_batch_has_rows_of_all_tasks(num_rows: list[int], more: int, step: int) -> None:
    batch_size = len(num_rows) + more
    rows = rows_of_step(step, num_rows=num_rows, batch_size=batch_size, seed=1)
    counts = Counter(task for task, _ in rows)
    assert len(rows) == batch_size
    assert set(counts) == set(range(len(num_rows)))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert [task for task, _ in rows] == sorted(task for task, _ in rows)
    assert all(0 <= row < num_rows[task] for task, row in rows)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(lambda sizes: [size / sum(sizes) for size in sizes]),
    st.integers(0, 40),
)
def test_rows_of_a_batch_are_by_share_and_of_every_task(shares: list[float], more: int) -> None:
    batch_size = len(shares) + more
    counts = counts_in_batch(shares, len(shares), batch_size)
    assert sum(counts) == batch_size
    assert min(counts) >= 1
    for count, share in zip(counts, shares, strict=True):
        assert count == 1 or count < share * batch_size + 1


SETTINGS = {"tasks": ["a", "b"], "weights": [1.0, 2.0], "projection": "none"} | {
    "granularity": "matrix",
    "reduce": "sum",
    "seed": 0,
}


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (None, None),
        ({"temperature": 1.0, "cap": None}, [0.9, 0.1]),
        ({"temperature": 2.0, "cap": None}, [0.75, 0.25]),
        ({"temperature": 1.0, "cap": 300}, [0.75, 0.25]),
        ({"shares": [1.0, 3.0]}, [0.25, 0.75]),
    ],
)
def test_shares_and_what_losses_count(sampling: dict[str, Any] | None, shares: list[float] | None) -> None:
    settings = SETTINGS if sampling is None else {**SETTINGS, "sampling": sampling}
    found, made = shares_of(settings, [900, 100]), joint(settings, [900, 100])
    assert found == (None if shares is None else pytest.approx(shares))
    assert made.weights == pytest.approx([1.0, 2.0] if shares is None else [2 * shares[0], 4 * shares[1]])


def test_a_balance_with_a_state_and_a_sampling_resume_bit_for_bit(run: Run, tmp_path: Path) -> None:
    run = changed(run, multitask={"balance": {"name": "gradnorm", "lr": 0.2}, "sampling": "proportional"})
    whole, again = tmp_path / "whole", tmp_path / "again"
    _, records = trained(run, whole)
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_rank, run, again, ("train", 5), world_size=1)
    trained(run, again)
    assert (again / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert lines(again, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    weights = [record["task_weights"] for record in records if record["phase"] == "train"]
    assert weights[0] == {"more": 1.0, "less": 1.0, "both": 1.0}
    assert all(sum(one.values()) == pytest.approx(3, abs=1e-3) for one in weights)
    assert weights[-1] != weights[0]


def with_form(run: Run, name: str, *, projection: str = "cached", **options: Any) -> Run:
    """The run with another form and, for what validation meets, measured every second step."""
    tasks = {task: replace(settings, validation=settings.test) for task, settings in run.tasks.items()}
    run = changed(replace(run, tasks=tasks), projection=projection, multitask={"balance": "none"}, validate_every=2)
    return replace(run, adapter=replace(run.adapter, form=Choice(name=name, options=options)))


def test_a_form_that_was_killed_ends_as_if_it_never_was_and_is_measured_task_by_task(run: Run, tmp_path: Path) -> None:
    run = with_form(run, "mtl_lora", heads=2, transform="diagonal")
    whole, again = tmp_path / "whole", tmp_path / "again"
    summary, records = trained(run, whole)
    for moment in (("calibrate", 3), ("train", 3)):
        with pytest.raises(Failed, match="SIGKILL"):
            run_distributed(train_rank, run, again, moment, world_size=1)
    trained(run, again)
    file = whole / "adapter.safetensors"
    assert (again / "adapter.safetensors").read_bytes() == file.read_bytes()
    assert lines(again, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    of_tasks = load_tasks(file)
    assert list(of_tasks) == ["more", "less", "both"]
    sparse = sum(entries.kept for entries in of_tasks["more"].blocks[0].entries.values())
    assert sparse == round(0.2 * of_tasks["more"].total)  # a diagonal keeps the mask, of as many entries as asked for
    assert summary["kept"] > 2 * sparse  # two heads, weights and diagonals
    measured = evaluate(run, file)
    for task in of_tasks:
        assert measured[task] == evaluate(run, Path(f"{file}@{task}"))[task]
    losses = [measured[task]["loss"] for task in of_tasks]
    assert records[-1]["validation_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert evaluate(run, Path(f"{file}@less"))["more"]["loss"] != pytest.approx(measured["more"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "options"), [("smora", {"bias": 0.05}), ("mixlora", {}), ("dac", {"keep": 2})])
def test_a_form_that_depends_on_the_input_resumes_bit_for_bit(
    run: Run, tmp_path: Path, form: str, options: dict[str, Any]
) -> None:
    run = with_form(run, form, **options)
    whole, again = tmp_path / "whole", tmp_path / "again"
    trained(run, whole)
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_rank, run, again, ("train", 3), world_size=1)
    trained(run, again)
    assert (again / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert lines(again, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    assert evaluate(run, whole / "adapter.safetensors").keys() == {"more", "less", "both"}


@pytest.mark.parametrize(
    ("form", "options", "balance", "engine"),
    [
        ("task_lora", {"sharing": "extra"}, "ortho", "fsdp"),
        pytest.param("task_lora", {"sharing": "none"}, "none", "deepspeed", marks=pytest.mark.slow),
        pytest.param("mtl_lora", {}, "nash", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_a_form_as_one_does(
    run: Run, tmp_path: Path, form: str, options: dict[str, Any], balance: str, engine: str
) -> None:
    run = changed(with_form(run, form, **options), multitask={"balance": balance}, steps=3)
    trained(run, tmp_path / "one")
    trained(changed_engine(run, engine), tmp_path / "two", world_size=2)
    one, two = (load_tasks(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    for task, adapter in one.items():
        found, wanted = flat(two[task]), flat(adapter)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_it_writes_one_adapter_that_the_base_takes(run: Run, tmp_path: Path) -> None:
    summary, records = trained(run, tmp_path / "job")
    adapter = load_adapter(tmp_path / "job" / "adapter.safetensors")
    assert [block.name for block in adapter.blocks] == ["joint"]
    assert adapter.kept == summary["kept"] == round(0.2 * adapter.total)
    attach(tiny_llama(), adapter)
    assert [(record["phase"], record["step"]) for record in records] == [
        *(("calibrate", step) for step in (1, 2, 3)),
        *(("train", step) for step in range(1, STEPS + 1)),
    ]
    for record in records:
        losses = record["task_losses"]
        assert record["loss"] == pytest.approx(losses["more"] + 2 * losses["less"] + losses["both"])
        assert set(record["conflicts"]) == {"more+less", "more+both", "less+both"}
        assert record["exchanged_bytes"] == 0
    assert records[-1]["loss"] < records[3]["loss"]


def test_its_conflicts_are_summed_up(run: Run, tmp_path: Path) -> None:
    summary, records = trained(run, tmp_path / "job")
    conflicts = summary["conflicts"]
    assert conflicts["steps"] == STEPS
    assert conflicts["layers"] == ["model.layers.0", "model.layers.1"]
    assert [pair["tasks"] for pair in conflicts["pairs"]] == [["more", "less"], ["more", "both"], ["less", "both"]]
    of_layers = [line for line in lines(tmp_path / "job", "conflicts.jsonl") if line["phase"] == "train"]
    assert len(of_layers) == STEPS
    for pair in conflicts["pairs"]:
        key = "+".join(pair["tasks"])
        last = [record["conflicts"][key] for record in records if record["phase"] == "train"]
        assert pair["cosine"] == pytest.approx(sum(item["cosine"] for item in last) / STEPS, abs=1e-4)
        assert pair["share"] == pytest.approx(sum(item["share"] for item in last) / STEPS, abs=1e-4)
        for layer, often in enumerate(pair["layers"]["often"]):
            found = [line["cosines"][key][layer] < 0 for line in of_layers]
            assert often == pytest.approx(sum(found) / STEPS, abs=1e-4)
    assert any(pair["share"] > 0 for pair in conflicts["pairs"])


@pytest.mark.parametrize("projection", ["cached", "trained"])
def test_a_training_that_was_killed_ends_as_if_it_never_was(run: Run, tmp_path: Path, projection: str) -> None:
    run = changed(run, projection=projection)
    whole, again = tmp_path / "whole", tmp_path / "again"
    summary, _ = trained(run, whole)
    for moment in (("calibrate", 3), ("train", 3), ("train", 5)):
        with pytest.raises(Failed, match="SIGKILL"):
            run_distributed(train_rank, run, again, moment, world_size=1)
    resumed, _ = trained(run, again)
    assert (again / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    for name in ("metrics.jsonl", "conflicts.jsonl"):
        assert lines(again, name) == lines(whole, name)
    times = {"seconds": 0, "step_seconds": 0}
    assert {**resumed, **times} == {**summary, **times}


@pytest.mark.parametrize(
    ("projection", "engine"),
    [
        ("cached", "fsdp"),
        ("trained", "deepspeed"),
        *(
            pytest.param(projection, engine, marks=pytest.mark.slow)
            for projection, engine in (
                ("cached", "ddp"),
                ("cached", "deepspeed"),
                ("trained", "ddp"),
                ("trained", "fsdp"),
            )
        ),
    ],
)
def test_two_ranks_give_the_adapter_of_one(run: Run, tmp_path: Path, engine: str, projection: str) -> None:
    run = changed(run, projection=projection)
    trained(run, tmp_path / "one")
    _, records = trained(changed_engine(run, engine), tmp_path / "two", world_size=2)
    one, two = (flat(load_adapter(tmp_path / name / "adapter.safetensors")) for name in ("one", "two"))
    assert float((one - two).norm() / one.norm()) < 1e-4  # Adam makes much of the rounding of small gradients
    assert all(record["exchanged_bytes"] > 0 for record in records)


def test_a_trained_a_is_in_the_file(run: Run, tmp_path: Path) -> None:
    run = changed(run, projection="trained", multitask={"projection": "none"})
    summary, records = trained(replace(run, adapter=replace(run.adapter, density=1.0)), tmp_path / "job")
    [block] = load_adapter(tmp_path / "job" / "adapter.safetensors").blocks
    assert block.seed is None
    assert set(block.projections) == set(block.entries)
    assert "conflicts" not in summary
    assert set(records[-1]["task_losses"]) == {"more", "less", "both"}


def test_one_task_alone_can_train_its_a(run: Run, tmp_path: Path) -> None:
    """Plain LoRA."""
    run = replace(changed(run, projection="trained"), multitask=Choice(name="independent"))
    run = replace(run, adapter=replace(run.adapter, density=1.0))
    run_distributed(train_alone, run, tmp_path / "one", world_size=1)
    run_distributed(train_alone, changed_engine(run, "fsdp"), tmp_path / "two", world_size=2)
    one, two = (load_adapter(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert float((flat(one) - flat(two)).norm() / flat(one).norm()) < 1e-4
    frozen = replace(run, adapter=replace(run.adapter, projection="cached"))
    run_distributed(train_alone, frozen, tmp_path / "frozen", world_size=1)
    seeded = load_adapter(tmp_path / "frozen" / "adapter.safetensors").blocks[0]
    for module, a in one.blocks[0].projections.items():
        start = seeded.projection(module, one.shapes[module][1])
        moved = (a - start).norm() / start.norm()  # type: ignore[operator]
        assert 1e-4 < float(moved) < 1


def changed_engine(run: Run, name: str) -> Run:
    return replace(run, train=replace(run.train, engine=Choice(name=name)))


def train_alone(run: Run, folder: Path) -> None:
    train(run, "both", from_environment(), folder, fingerprint="f")
