"""An adapter for each cluster of all tasks' rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lori_dist import config, jobs
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError
from lori_dist.evaluation._clusters import clusters, divide
from lori_dist.formats import native
from lori_dist.tensors import stored
from lori_dist.training import data
from lori_dist.training.model import load_model, load_tokenizer
from lori_dist.training.train import train
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_llama
from tests.tokenizers import save

TASKS = ("copy", "count")
WORDS = ["abc", "zzzzzz", "abd", "zzzz", "abcc", "zzzzzzz", "acb"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("clustered")
    save(tiny_llama(), place / "model")
    tasks = {}
    for number, task in enumerate(TASKS):
        lines = [json.dumps({"prompt": f"{word} ", "response": str(number)}) + "\n" for word in WORDS[number:]]
        (place / f"{task}.jsonl").write_text("".join(lines))
        tasks[task] = {"train": str(place / f"{task}.jsonl"), "test": str(place / f"{task}.jsonl")}
    return config.validate(
        {
            "name": "t",
            "output": str(place / "runs"),
            "model": {"path": str(place / "model")},
            "tasks": tasks,
            "adapter": {"rank": 4, "density": 0.5},
            "train": {"epochs": 2, "batch_size": 3, "lr": 1e-2, "calibrate": {"steps": 2}},
            "evaluate": {"batch_size": 3},
            "trackers": [],
            "merges": {"all": {"method": "cp"}},
            "multitask": {"name": "clustered", "clusters": 2},
        }
    )


def divided(run: Run) -> dict[str, Any]:
    [job] = (job for job in jobs.plan(run) if job.kind == "cluster")
    place = run.folder / "cluster-rows"
    place.mkdir(parents=True, exist_ok=True)
    return divide(run, job, from_environment(), place, still_mine=lambda: None)


def by_hand(run: Run) -> list[list[int]]:
    """The cluster of each row of each task, from the mean of its last states, row by row in one process."""
    model, tokenizer, means = load_model(run.model), load_tokenizer(run.model), []
    for task in run.tasks.values():
        for example in data.encode(data.read(task.train, task.template), tokenizer, run.train.max_length):
            ids = torch.tensor([example.prompt_ids + example.response_ids])
            with torch.no_grad():
                mean = model.model(input_ids=ids).last_hidden_state[0].mean(0)
            means.append((mean / mean.norm()).double().numpy())
    return [of_task.tolist() for of_task in np.split(clusters(np.stack(means), 2, 0), [len(WORDS)])]


def both(run: Run, alone: Run, folder: Path) -> None:
    world = from_environment()
    train(run, "cluster-2", world, folder / "cluster", fingerprint="f", cluster={"place": 1, "clusters": 2})
    train(alone, "cluster-2", world, folder / "alone", fingerprint="f")


def test_a_cluster_is_trained_as_a_task_with_its_rows_would_be(run: Run, tmp_path: Path) -> None:
    sharded = replace(run, evaluate=replace(run.evaluate, engine=Choice(name="fsdp")))
    results = run_distributed(divided, sharded, world_size=2)
    wanted = by_hand(run)
    assert results[0] == results[1]
    assert results[0]["tasks"] == {
        task: np.bincount(of_task, minlength=2).tolist() for task, of_task in zip(TASKS, wanted, strict=True)
    }
    there = stored(run.folder / "cluster-rows" / "clusters.safetensors")
    assert [there[task].load().tolist() for task in TASKS] == wanted
    assert min(results[0]["sizes"]) > 1
    own = [
        line
        for task, of_task in zip(TASKS, wanted, strict=True)
        for line, number in zip(Path(run.tasks[task].train).read_text().splitlines(True), of_task, strict=True)
        if number == 1
    ]
    (tmp_path / "rows.jsonl").write_text("".join(own))
    task = replace(run.tasks["copy"], train=str(tmp_path / "rows.jsonl"))
    alone = replace(run, tasks={"cluster-2": task}, multitask=Choice(name="independent"), merges={})
    run_distributed(both, run, alone, tmp_path, world_size=1)
    blocks = [native.load(tmp_path / name / "adapter.safetensors").blocks[0] for name in ("cluster", "alone")]
    assert blocks[0].seed == blocks[1].seed
    assert blocks[0].name == "cluster-2"
    assert blocks[0].entries.keys() == blocks[1].entries.keys()
    for module, entries in blocks[1].entries.items():
        assert torch.equal(blocks[0].entries[module].values, entries.values)


def test_the_plan_has_a_training_for_each_cluster(run: Run) -> None:
    planned = {job.name: job for job in jobs.plan(run)}
    assert {name: job.needs for name, job in planned.items()} == {
        "cluster-rows": (),
        "train-cluster-1": ("cluster-rows",),
        "train-cluster-2": ("cluster-rows",),
        "merge-all": ("train-cluster-1", "train-cluster-2"),
        "evaluate-base": (),
        **{f"evaluate-cluster-{number}": (f"train-cluster-{number}",) for number in (1, 2)},
        "evaluate-all": ("merge-all",),
    }
    assert planned["train-cluster-1"].fingerprint != planned["train-cluster-2"].fingerprint
    more = replace(run, multitask=Choice(name="clustered", options={"clusters": 2, "seed": 1}))
    others = {job.name: job for job in jobs.plan(more)}
    assert others["merge-all"].fingerprint != planned["merge-all"].fingerprint
    found = jobs.differences("cluster", planned["cluster-rows"].settings, others["cluster-rows"].settings)
    assert found == ["multitask.seed 0 -> 1"]


def test_clusters_are_those_that_there_are() -> None:
    random = np.random.default_rng(0)
    centres = 10 * random.normal(size=(5, 3))
    truth = random.integers(5, size=200)
    points = centres[truth] + 0.1 * random.normal(size=(200, 3))
    found = clusters(points, 5, seed=3)
    assert [found[truth == number].min() for number in range(5)] == [
        found[truth == number].max() for number in range(5)
    ]
    assert [int(one) for one in dict.fromkeys(found)] == [0, 1, 2, 3, 4]  # numbered as they come
    assert (clusters(points, 5, seed=3) == found).all()
    assert set(clusters(points, 1, seed=0)) == {0}
    assert set(clusters(points[:6], 6, seed=1)) == set(range(6))
    with pytest.raises(ConfigError, match=r"multitask.clusters: got 3, and the tasks have 2 rows that differ"):
        clusters(np.repeat(points[:2], 4, axis=0), 3, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merges": {"all": {"method": "cp", "weights": [1, 2]}}},
            "merges.all.weights: is for tasks, and multitask clus",
        ),
        ({"merges": {"cluster-1": {"method": "cp"}}}, "cluster-1: is the name of a cluster's adapter"),
        ({"adapter": {"init": "osrm"}}, "adapter.init: got osrm, which is for an adapter of each task"),
        ({"multitask": {"name": "clustered", "clusters": 1}}, "multitask.clusters: got 1; it must be in .2, inf"),
    ],
)
def test_what_does_not_combine_is_refused(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs.plan(config.validate({**config.dump(run), **change}))
