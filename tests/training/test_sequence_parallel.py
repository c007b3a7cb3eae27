"""Rows whose tokens are divided among ranks give what undivided rows give."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lori_dist import Spec, attach, config, trainable
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.jobs import joint_job, train_job
from lori_dist.plan import Hardware, plan
from lori_dist.training.data import Example, collate
from lori_dist.training.loss import loss_sum
from lori_dist.training.sequence_parallel import divide_attention, join
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import KINDS, tiny
from tests.training.test_packed import adapter, assert_equal, pack

HARDWARE = Hardware(gpus=2, nodes=1, gpu_memory=80e9, tflops=100.0, link=100.0, network=10.0)
DIVIDED = [kind for kind in (*KINDS, "mixtral", "qwen3_moe") if kind not in ("mistral", "gemma2")]
"""But for a window of 6 tokens, and for attention that caps its scores, which sdpa cannot."""


def row(first: int, length: int) -> Example:
    ids = tuple((first + 7 * place) % 60 + 3 for place in range(length))
    return Example(prompt="", response="", prompt_ids=ids[: length // 3], response_ids=ids[length // 3 :])


def divided_and_whole(kind: str) -> list[tuple[Tensor, Tensor]]:
    """The loss and the gradients with rows that are divided among all ranks, and with whole ones."""
    world, found = from_environment(), []
    batch = collate([row(1, 9), row(4, 14), row(9, 3)], 0)
    for size in (world.size, 1):
        model = tiny(kind)
        attach(model, Spec(rank=4, alpha=8.0, seed=1))
        with torch.no_grad():
            for number, parameter in enumerate(trainable(model).values()):
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()) * (number % 3 - 1))
        group = join(config.Train(steps=1, sequence_parallel=size), world)
        divide_attention(model, group, 14)
        loss = loss_sum(model, group.part(batch, 0))
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])
        if size > 1:
            loss = loss.detach()
            dist.all_reduce(loss)
            dist.all_reduce(gradients)
        found.append((loss.detach(), gradients))
    return found


def of_kinds(kinds: list[str]) -> dict[str, Any]:
    return {kind: divided_and_whole(kind) for kind in kinds}


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_and_gradients_are_those_of_whole_rows(world_size: int) -> None:
    kinds = [kind for kind in DIVIDED if world_size == 2 or kind != "gpt2"]  # which has two heads
    for found in run_distributed(of_kinds, kinds, world_size=world_size):
        for kind, ((loss, gradients), (wanted, others)) in found.items():
            assert loss == pytest.approx(wanted.item(), rel=1e-6), kind
            assert float((gradients - others).norm() / others.norm()) < 5e-6, kind


# --- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    tasks = {}
    for name, count in {"short": 5, "long": 9}.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{n} and {n * 7 % 5}: " * (1 + n % 3), "response": f"yes {n}"} for n in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {"train": str(path), "test": str(path), "validation": str(path)}
    return config.validate(
        {
            "name": "test",
            "output": str(tmp_path / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": tasks,
            "adapter": {"rank": 4, "alpha": 8, "density": 0.3, "seed": 3},
            "train": {
                "epochs": 2,
                "batch_size": 4,
                "micro_batch_size": 2,
                "lr": 2e-2,
                "eps": 1e-3,
                "validate_every": 2,
                "calibrate": {"epochs": 1},
            },
        }
    )


def changed(run: Run, name: str, engine: dict[str, Any], **more: Any) -> Run:
    return config.validate(
        {**config.dump(run), "name": name, "train": {**config.dump(run)["train"], "engine": engine, **more}}
    )


def alone(run: Run, task: str = "long") -> None:
    job = train_job(run, task)
    train(run, task, from_environment(), run.folder / job.name, fingerprint=job.fingerprint)


def jointly(run: Run) -> None:
    balance = {"projection": "original", "granularity": "matrix", "reduce": "sum", "seed": 0}
    job = joint_job(run, {"tasks": list(run.tasks), "weights": [1.0, 1.0], **balance})
    folder = run.folder / job.name
    train(run, "joint", from_environment(), folder, fingerprint=job.fingerprint, joint=job.settings["joint"])


def validation_losses(run: Run, name: str) -> list[float]:
    lines = (run.folder / name / "metrics.jsonl").read_text().splitlines()
    return [line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line]


ENGINES: list[dict[str, Any]] = [
    {"name": "ddp"},
    {"name": "fsdp"},
    *({"name": "deepspeed", "stage": stage} for stage in (2, 3)),
]


def test_a_training_gives_the_adapter_of_whole_rows(run: Run) -> None:
    run_distributed(alone, run, world_size=1)
    for number, engine in enumerate(ENGINES):
        found = changed(run, f"run{number}", engine, sequence_parallel=2, activation_checkpointing=number % 2 == 1)
        run_distributed(alone, found, world_size=4 if engine["name"] == "fsdp" else 2)
        assert_equal(adapter(found, "long"), adapter(run, "long"))
        assert validation_losses(found, "train-long") == pytest.approx(validation_losses(run, "train-long"), rel=1e-5)


@pytest.mark.slow
def test_several_tasks_over_one_base_and_joint_training(run: Run) -> None:
    found = changed(run, "found", {"name": "fsdp"}, sequence_parallel=2)
    for task in run.tasks:
        run_distributed(alone, run, task, world_size=1)
    run_distributed(pack, found, list(run.tasks), world_size=2)
    for task in run.tasks:
        assert_equal(adapter(found, task), adapter(run, task))
    run_distributed(jointly, run, world_size=1)
    run_distributed(jointly, found, world_size=2)
    assert_equal(adapter(found, "joint"), adapter(run, "joint"))


# --- what cannot be --------------------------------------------------------------------------------------------------


def refused(run: Run) -> str:
    try:
        alone(run)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_cannot_be_divided_is_refused_with_a_remedy(run: Run, tmp_path: Path) -> None:
    divided = changed(run, "divided", {"name": "ddp"}, sequence_parallel=3)
    assert refused(divided).startswith("train.sequence_parallel: got 3 for 1 rank; give a divisor")
    for key in ("pack", "compile"):
        with pytest.raises(ConfigError, match=rf"sequence_parallel: cannot be combined with train\.{key}; remove"):
            changed(run, "divided", {"name": "ddp"}, sequence_parallel=2, **{key: True})
    tiny("mistral").save_pretrained(tmp_path / "mistral")
    model = dataclasses.replace(run.model, path=str(tmp_path / "mistral"))
    divided = changed(run, "divided", {"name": "ddp"}, sequence_parallel=2, max_length=64)
    with pytest.raises(ConfigError, match=r"within 6 tokens.*max_length is 64"):
        plan(dataclasses.replace(divided, model=model), HARDWARE)


def test_a_plan_divides_what_a_rank_holds_of_a_row(run: Run) -> None:
    divided = changed(run, "divided", {"name": "fsdp"}, sequence_parallel=2, max_length=128, batch_size=8)
    whole = changed(run, "whole", {"name": "fsdp"}, max_length=128, batch_size=8)
    (one, *_), (other, *_) = (plan(each, HARDWARE)["placements"] for each in (whole, divided))
    assert other["memory"]["activations"] < 0.6 * one["memory"]["activations"]
    assert 1.8 * one["longest_row"] < other["longest_row"] < 2.6 * one["longest_row"]
