"""Trainings that go on from an adapter that is there, an official checkpoint among them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lori_dist import config, formats
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.attach import attach, extract, trainable
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError, JobError
from lori_dist.formats import native
from lori_dist.jobs import check_inputs, train_job
from lori_dist.training import data
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.metrics import Record
from lori_dist.training.model import identity, load_model, load_tokenizer
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.formats.official import lori_s
from tests.integrations.made import trained
from tests.models import tiny_llama
from tests.tokenizers import save

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5.23 for it
)
TOLERANCE = 5e-6
ENGINES = [Choice(name="ddp"), Choice(name="fsdp"), *(Choice(name="deepspeed", options={"stage": s}) for s in (2, 3))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an official checkpoint, and an adapter of ours with a seed."""
    folder = tmp_path_factory.mktemp("start")
    settings = config.Model(path=str(save(tiny_llama(), folder / "tiny")))
    lori_s(folder / "LoRI-S_code", sparsity=0.5)
    native.save(trained(tiny_llama(), density=0.3, base=identity(settings)), folder / "ours.safetensors")
    return folder


def described(place: Path, folder: Path, start: str) -> Run:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}: ", "response": f"{7 * n % 5}"}) + "\n" for n in range(8)))
    task = {"train": str(rows), "test": str(rows), "start": str(place / start)}
    # A large eps, or Adam makes steps of the rounding of gradients near zero.
    how = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "eps": 1e-3, "checkpoint_every": 2}
    model = {"path": str(place / "tiny")}
    return config.validate({"name": "t", "model": model, "tasks": {"more": task}, "train": {**how, "clip": None}})


def go_on(run: Run, folder: Path, die_at: int | None = None) -> None:
    def watch(record: Record) -> None:
        if record["step"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(run, "more", from_environment(), folder, fingerprint="f", progress=watch)


def by_hand(run: Run, start: Adapter) -> Adapter:
    """The same, with the model in one process and AdamW."""
    model, tokenizer = load_model(run.model), load_tokenizer(run.model)
    attach(model, start, train=True)
    task = run.tasks["more"]
    examples = data.encode(data.read(task.train, task.template), tokenizer, run.train.max_length)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=run.train.lr, eps=run.train.eps, weight_decay=0.0)
    for step in range(6):
        rows = data.rows_of_step(step, num_rows=8, batch_size=4, seed=0, epochs=None)
        batch = data.collate([examples[row] for row in rows], 0)
        (loss_sum(model, batch) / num_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return extract(model, name="more")


def assert_equal(found: Adapter, wanted: Adapter) -> None:
    [ours], [theirs] = found.blocks, wanted.blocks
    for name in ("seed", "rank", "alpha", "checksums"):
        assert getattr(ours, name) == getattr(theirs, name)
    for module, entries in theirs.entries.items():
        own = ours.entries[module]
        assert (own.index is None and entries.index is None) or torch.equal(own.index, entries.index)  # type: ignore[arg-type]
        assert float((own.values - entries.values).norm()) <= TOLERANCE * float(entries.values.norm())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.name}{engine.options.get('stage', '')}")
def test_an_official_checkpoint_is_trained_further_on_every_engine(place: Path, engine: Choice, tmp_path: Path) -> None:
    run = described(place, tmp_path, "LoRI-S_code")
    start = formats.load(place / "LoRI-S_code")
    run = replace(run, train=replace(run.train, engine=engine))
    run_distributed(go_on, run, tmp_path / "job", world_size=2)
    found = native.load(tmp_path / "job" / "adapter.safetensors")
    assert_equal(found, by_hand(run, start))
    assert found.blocks[0].seed is None
    assert all(torch.equal(found.blocks[0].projections[m], a) for m, a in start.blocks[0].projections.items())  # type: ignore[arg-type]
    moved = [found.blocks[0].entries[m].values - entries.values for m, entries in start.blocks[0].entries.items()]
    assert all(bool(of_module.abs().max() > 1e-3) for of_module in moved)
    records = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == ["train"] * 6


def test_a_killed_one_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    run = described(place, tmp_path, "ours.safetensors")
    run_distributed(go_on, run, tmp_path / "whole", world_size=1)
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_distributed(go_on, run, tmp_path / "job", 5, world_size=1)
    run_distributed(go_on, run, tmp_path / "job", world_size=1)
    whole, job = (native.load(tmp_path / name / "adapter.safetensors") for name in ("whole", "job"))
    assert_equal(whole, by_hand(run, formats.load(place / "ours.safetensors")))
    assert all(
        torch.equal(job.blocks[0].entries[module].values, entries.values)
        for module, entries in whole.blocks[0].entries.items()
    )


def test_another_start_is_another_job(place: Path, tmp_path: Path) -> None:
    run = described(place, tmp_path, "ours.safetensors")
    job = train_job(run, "more")
    without = replace(run, tasks={"more": replace(run.tasks["more"], start=None)})
    assert job.fingerprint != train_job(without, "more").fingerprint
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((place / "ours.safetensors").read_bytes())
    moved = replace(run, tasks={"more": replace(run.tasks["more"], start=str(copy))})
    assert train_job(moved, "more").fingerprint == job.fingerprint
    native.save(trained(tiny_llama(), seed=9), copy)
    with pytest.raises(JobError, match=r"tasks.more.start: has changed since the run began"):
        check_inputs(moved, job)


def test_an_adapter_of_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    other = {**identity(config.Model(path=str(place / "tiny"))), "weights": "0" * 16}
    native.save(trained(tiny_llama(), base=other), tmp_path / "other.safetensors")
    run = described(place, tmp_path, str(tmp_path / "other.safetensors"))
    with pytest.raises(
        pytest.fail.Exception, match=r"ConfigError: tasks.more.start: .*other.safetensors: was trained on"
    ):
        run_distributed(go_on, run, tmp_path / "job", world_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks.more.start": "nowhere"}, "tasks.more.start: there is no file or folder 'nowhere'"),
        ({"tasks.more.seed": 3}, "tasks.more.seed: cannot be combined with tasks.more.start, whose A stays"),
        ({"multitask": "joint"}, "tasks.more.start: cannot be combined with multitask joint"),
        ({"adapter.projection": "trained"}, "tasks.more.start: its A stays and its kept entries alone are trained"),
    ],
)
def test_what_contradicts_it_is_refused(place: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    tree = config.dump(described(place, tmp_path, "ours.safetensors"))
    for path, value in change.items():
        holder, *keys = tree, *path.split(".")
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config.validate(tree)
