"""Spikes that are skipped or rolled back, losses on validation rows, and ending early: as the same by hand, on every
engine, and when killed."""

import copy
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, trainable
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError
from lori_dist.formats import native
from lori_dist.jobs import task_seed, train_job
from lori_dist.training import data
from lori_dist.training.divergence import Divergence
from lori_dist.training.engine import StepResult
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.metrics import Record
from lori_dist.training.model import load_model, load_tokenizer
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed

STEPS, SPIKE, EVERY = 38, 1.04, 4
TOLERANCE = 2e-5
"""Of so many steps at a high rate, each of which adds its rounding."""
ENGINES = {
    "ddp": Choice(name="ddp"),
    "fsdp": Choice(name="fsdp"),
    **{f"deepspeed{stage}": Choice(name="deepspeed", options={"stage": stage}) for stage in (2, 3)},
}


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    """Rows that are all alike but for one; validation rows that are unlearned as these are learned."""
    rows = [{"prompt": "say: ", "response": "yes yes yes"}] * 31 + [{"prompt": "9*9*: ", "response": "zq{}zq"}]
    held = [{"prompt": "say: ", "response": answer} for answer in ("no", "never", "no no")]
    for name, of_file in (("rows", rows), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    task = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")}
    # A large eps, or Adam makes steps of the rounding of gradients near zero.
    how = {"steps": STEPS, "batch_size": 2, "micro_batch_size": 1, "lr": 3e-2, "eps": 1e-3, "clip": None}
    return config.validate(
        {
            "name": "t",
            "output": str(tmp_path / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": {"odd": {**task, "validation": str(tmp_path / "held.jsonl")}},
            "adapter": {"rank": 4, "alpha": 8, "density": 1.0},
            "train": {**how, "checkpoint_every": EVERY, "spike": SPIKE, "on_divergence": "skip"},
        }
    )


def changed(run: Run, **settings: Any) -> Run:
    return replace(run, train=replace(run.train, **settings))


def fit(run: Run, folder: Path, die_at: int | None = None) -> dict[str, Any]:
    def watch(record: Record) -> None:
        if record["step"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(run, "odd", from_environment(), folder, fingerprint="f", progress=watch)


def records(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder: Path) -> Tensor:
    [block] = native.load(folder / "adapter.safetensors").blocks
    return torch.cat([entries.values for entries in block.entries.values()])


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm()) <= TOLERANCE * float(wanted.norm())


def by_hand(run: Run, num_steps: int = STEPS) -> tuple[Tensor, list[int]]:
    """The same in one process with AdamW; and the steps that were not done."""
    model, tokenizer = load_model(run.model), load_tokenizer(run.model)
    attach(model, Spec(rank=4, alpha=8, seed=task_seed(run, "odd")))
    task, wrong = run.tasks["odd"], []
    examples = data.encode(data.read(task.train, task.template), tokenizer, run.train.max_length)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=run.train.lr, eps=run.train.eps, weight_decay=0.0)

    def state() -> tuple[list[Tensor], Any]:
        kept = [parameter.detach().clone() for parameter in trainable(model).values()]
        return kept, copy.deepcopy(optimizer.state_dict())

    saved, divergence = state(), Divergence(run.train.spike, [])
    for step in range(num_steps):
        rows = data.rows_of_step(step, num_rows=len(examples), batch_size=2, seed=0, epochs=None)
        batch = data.collate([examples[row] for row in rows], 0)
        loss = loss_sum(model, batch) / num_targets(batch)
        loss.backward()
        if divergence.accepts(StepResult(loss=float(loss.detach()), grad_norm=0.0)):
            optimizer.step()
        else:
            wrong.append(step + 1)
            if run.train.on_divergence == "rollback":
                with torch.no_grad():
                    for now, before in zip(trainable(model).values(), saved[0], strict=True):
                        now.copy_(before)
                optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            saved = state()
    return torch.cat([v.detach() for v in trainable(model).values()]), wrong


@pytest.mark.parametrize(
    ("policy", "engine"),
    [
        ("skip", "ddp"),
        ("skip", "deepspeed3"),
        ("rollback", "fsdp"),
        *(
            pytest.param(policy, engine, marks=pytest.mark.slow)
            for policy, engine in (
                *(("skip", "fsdp"), ("skip", "deepspeed2")),
                *(("rollback", "ddp"), ("rollback", "deepspeed2"), ("rollback", "deepspeed3")),
            )
        ),
    ],
)
def test_a_spike_changes_nothing_on_any_engine(run: Run, engine: str, policy: str, tmp_path: Path) -> None:
    run = changed(run, engine=ENGINES[engine], on_divergence=policy)
    wanted, wrong = by_hand(run)
    assert wrong  # or nothing is shown
    run_distributed(fit, run, tmp_path / "job", world_size=2)
    found = records(tmp_path / "job")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["step"] for record in found if "update" in record] == wrong
    back = (wrong[0] - 1) // EVERY * EVERY
    assert found[wrong[0] - 1]["update"] == ("skipped" if policy == "skip" else f"rolled back to step {back}")
    assert_near(values(tmp_path / "job"), wanted)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_killed_after_a_spike_it_goes_on_bit_for_bit(run: Run, policy: str, tmp_path: Path) -> None:
    run = changed(run, on_divergence=policy)
    _, wrong = by_hand(run)
    run_distributed(fit, run, tmp_path / "whole", world_size=1)
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_distributed(fit, run, tmp_path / "job", wrong[0] + 2, world_size=1)
    run_distributed(fit, run, tmp_path / "job", world_size=1)
    assert torch.equal(values(tmp_path / "job"), values(tmp_path / "whole"))
    about = [[(r["step"], r["loss"], r.get("update")) for r in records(tmp_path / name)] for name in ("job", "whole")]
    assert about[0] == about[1]


def test_by_default_a_spike_that_is_told_of_ends_the_training(run: Run, tmp_path: Path) -> None:
    run = changed(run, on_divergence="stop")
    _, wrong = by_hand(changed(run, on_divergence="skip"))
    message = rf"odd: at step {wrong[0]} of {STEPS} of phase train the loss is \S+, and the median of the last \d+ \S+;"
    with pytest.raises(pytest.fail.Exception, match=message):
        run_distributed(fit, run, tmp_path / "job", world_size=1)
    assert not (tmp_path / "job" / "adapter.safetensors").exists()


def test_what_goes_wrong_again_and_again_ends_too() -> None:
    divergence = Divergence(None, [])
    assert divergence.accepts(StepResult(loss=1.0, grad_norm=1.0))
    for number in range(3):
        assert not divergence.accepts(StepResult(loss=math.nan, grad_norm=1.0))
        assert divergence.in_a_row == number + 1
    lines = [{"loss": 1.0}, {"loss": None, "update": "skipped"}, {"loss": None, "update": "skipped"}]
    assert Divergence(None, lines).in_a_row == 2


def test_a_loss_that_is_no_number_ends_a_training_that_only_skips(run: Run, tmp_path: Path) -> None:
    run = changed(run, lr=1e30, spike=None)
    with pytest.raises(pytest.fail.Exception, match=r"JobError: odd: at step .*, as at the 10 steps before; lower the"):
        run_distributed(fit, run, tmp_path / "job", world_size=1)


@pytest.mark.parametrize(
    "engine",
    ["fsdp", "deepspeed3", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "deepspeed2"))],
)
def test_ended_early_it_has_the_values_of_the_lowest_validation_loss(run: Run, engine: str, tmp_path: Path) -> None:
    run = changed(run, spike=None, engine=ENGINES[engine], validate_every=2, early_stop=2)
    [summary, _] = run_distributed(fit, run, tmp_path / "job", world_size=2)
    found = {r["step"]: r["validation_loss"] for r in records(tmp_path / "job") if "validation_loss" in r}
    best = min(found, key=lambda step: found[step])
    assert summary["best"] == {"step": best, "loss": found[best]}
    assert summary["steps"] == max(found) == best + 4 < STEPS
    wanted, _ = by_hand(run, best)
    assert_near(values(tmp_path / "job"), wanted)


def test_the_validation_loss_is_that_of_all_its_rows(run: Run, tmp_path: Path) -> None:
    run = changed(run, spike=None, steps=2, validate_every=2)
    run_distributed(fit, run, tmp_path / "job", world_size=2)
    model, tokenizer = load_model(run.model), load_tokenizer(run.model)
    attach(model, native.load(tmp_path / "job" / "adapter.safetensors"))
    task = run.tasks["odd"]
    batch = data.collate(data.encode(data.read(str(task.validation), task.template), tokenizer, 512), 0)
    wanted = float(loss_sum(model, batch)) / num_targets(batch)
    assert records(tmp_path / "job")[-1]["validation_loss"] == pytest.approx(wanted, rel=1e-5)


def deterministic(run: Run, folder: Path) -> bool:
    fit(run, folder)
    return torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("is_on", [True, False])
def test_kernels_are_told_to_be_deterministic(run: Run, is_on: bool, tmp_path: Path) -> None:
    assert run_distributed(deterministic, changed(run, steps=2, deterministic=is_on), tmp_path, world_size=1) == [is_on]


def test_guards_are_part_of_what_a_job_is_only_where_they_guard(run: Run) -> None:
    plain = changed(run, spike=None, on_divergence="stop")
    assert "spike" not in train_job(plain, "odd").settings["train"]
    assert train_job(run, "odd").fingerprint != train_job(plain, "odd").fingerprint
    assert train_job(changed(plain, deterministic=True), "odd").fingerprint == train_job(plain, "odd").fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_stop": 2}, "train.early_stop: is set without train.validate_every"),
        ({"on_divergence": "rollback", "checkpoint_every": None}, "train.on_divergence: rollback goes back to a check"),
        ({"spike": 1.0}, "train.spike: got 1.0; it should be greater than 1"),
        ({"on_divergence": "ignore"}, "train.on_divergence: got 'ignore'; "),
    ],
)
def test_what_cannot_be_is_refused(run: Run, change: dict[str, Any], message: str) -> None:
    tree = config.dump(run)
    tree["train"] |= change
    with pytest.raises(ConfigError, match=message):
        config.validate(tree)
