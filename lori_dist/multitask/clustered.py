"""An adapter for each cluster of rows that are alike, whatever task they are of (TC-LoRA, arXiv 2508.03999)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job, cluster_job, cluster_train_job, evaluate_job, merge_job


def plan(run: Run, *, clusters: Annotated[int, "[2, inf)"] = 4, seed: Annotated[int, "[0, inf)"] = 0) -> list[Job]:
    """The division of all tasks' training rows into clusters, a training for each of them, the merges of their
    adapters, `cluster-1` and so on, and the evaluation of all models on every task.

    Rows are alike where the base ends in like states: the mean of its last hidden states over a row's tokens, of length
    1, is what k-means++ with Lloyd's algorithm divides. seed: of where that begins.
    Raises ConfigError, with every mistake, for a run that this cannot be.
    Source: TC-LoRA, of which the abstract and reviews could be read: clusters of embedded prompts, a LoRA for each, and
    a merge by a CP decomposition (`merges: {all: cp}`). The encoder and the number of clusters were not established:
    the base's own states, whole rows and k-means are ours.
    """
    problems = list(_problems(run, clusters))
    if problems:
        raise ConfigError("\n".join(problems))
    divided = cluster_job(run, clusters, seed)
    made = [cluster_train_job(run, divided, place, clusters) for place in range(clusters)]
    trained: dict[str, Job] = {job.settings["task"]: job for job in made}
    alike = replace(run, tasks=dict.fromkeys(trained, next(iter(run.tasks.values()))))  # merges are of clusters
    merged = {name: merge_job(alike, name, trained) for name in run.merges}
    evaluated = [evaluate_job(run, model, job) for model, job in {"base": None, **trained, **merged}.items()]
    return [divided, *made, *merged.values(), *evaluated]


def _problems(run: Run, clusters: int) -> Iterator[str]:
    names = {f"cluster-{place + 1}" for place in range(clusters)}
    for name in (*run.tasks, *run.merges):
        if name in names:
            yield f"{name}: is the name of a cluster's adapter; give the task or merge another name"
    for name, merge in run.merges.items():
        for key in ("tasks", "weights", "search"):
            if getattr(merge, key) is not None:
                yield f"merges.{name}.{key}: is for tasks, and multitask clustered merges clusters, alike; remove it"
    for name, task in run.tasks.items():
        for key in ("mixture", "seed", "start", "steps", "epochs", "lr"):
            if getattr(task, key) not in (None, {}):
                yield (
                    f"tasks.{name}.{key}: is for a training of that task, and multitask clustered trains clusters of "
                    "all tasks' rows; remove it"
                )
    if run.adapter.init != "random":
        yield f"adapter.init: got {run.adapter.init}, which is for an adapter of each task; use random"
