"""One adapter for all tasks (Ortho-LoRA, arXiv 2601.09684; PCGrad, arXiv 2001.06782; or plain joint training)."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.jobs import JOINT, Job, evaluate_job, joint_job
from lori_dist.plugin import nearest


def plan(
    run: Run,
    *,
    projection: Literal["original", "in_place", "none"] = "original",
    granularity: Literal["matrix", "layer", "type", "global"] = "matrix",
    reduce: Literal["sum", "mean"] = "sum",
    seed: Annotated[int, "[0, inf)"] = 0,
    weights: dict[str, float] | None = None,
) -> list[Job]:
    """One training on batches of all tasks, whose conflicting gradients are projected, and its evaluation.

    Every batch has as many rows of each task, to one. What is minimised is the sum over tasks of weight * mean loss of
    a target token. projection: a task's gradient that opposes another one loses what opposes it: of the other's own
    gradient (`original`), or of what that has become (`in_place`, as in the paper's listing); `none` is plain joint
    training. granularity: where two gradients are compared: in each A and each B apart, in a layer, in all A and in all
    B, or in everything (`global`, with `original` PCGrad). reduce: what is made of the tasks' gradients. seed: of the
    order in which they give way, drawn again in each step. weights: by task; by default 1.
    Raises ConfigError, with every mistake, for a run that this cannot be.
    """
    given = weights or {}
    problems = list(_problems(run, given))
    if problems:
        raise ConfigError("\n".join(problems))
    joint: dict[str, Any] = {
        "tasks": list(run.tasks),
        "weights": [float(given.get(task, 1.0)) for task in run.tasks],
        "projection": projection,
        "granularity": granularity,
        "reduce": reduce,
        "seed": seed,
    }
    trained = joint_job(run, joint)
    return [trained, evaluate_job(run, "base", None), evaluate_job(run, JOINT, trained)]


def _problems(run: Run, weights: dict[str, float]) -> Iterator[str]:
    if len(run.tasks) < 2:
        yield f"tasks: joint training needs at least two, got {', '.join(run.tasks)} alone; add one"
    if JOINT in run.tasks:
        yield f"tasks.{JOINT}: is the name of the adapter that all tasks have; give the task another name"
    if run.merges:
        yield f"merges: got {', '.join(run.merges)}, and joint training makes one adapter; remove merges"
    if run.train.batch_size < len(run.tasks):
        yield (
            f"train.batch_size: got {run.train.batch_size} for {len(run.tasks)} tasks, which all have rows in "
            "every batch; give at least as many"
        )
    for task, weight in weights.items():
        if task not in run.tasks:
            known = f"there are {', '.join(run.tasks)}.{nearest(task, run.tasks)}"
            yield f"multitask.weights.{task}: unknown task; {known}"
        if not 0 < weight < math.inf:
            yield f"multitask.weights.{task}: got {weight:g}; wanted a finite number above 0"
    for name, task_of_run in run.tasks.items():
        if task_of_run.seed is not None:
            yield (
                f"tasks.{name}.seed: is the seed of a task's own A, but joint training has one A for all tasks; set "
                "adapter.seed"
            )
