"""One task after the other, on one A (continual LoRI, arXiv 2504.07448, section on safety and then a task)."""

from collections.abc import Iterator, Sequence
from typing import Literal

from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.jobs import Job, evaluate_job, train_job


def plan(
    run: Run, *, masks: Literal["independent", "disjoint"] = "independent", order: tuple[str, ...] | None = None
) -> list[Job]:
    """A chain of trainings, and after each of them the evaluation of what there is by then.

    A training begins with the entries of B that earlier tasks have, which stay as they are, bit for bit: its own are
    added to them. The adapter it leaves has those of all tasks so far, one block each. Its mask comes from calibration
    on top of them, and is chosen among all entries (`independent`, as in the paper: at a shared place the values add
    up) or among those that no earlier task has (`disjoint`). order: the names of all tasks, the first to be trained
    first; by default that of `tasks`.
    Raises ConfigError, with every mistake, for a run that this cannot be.
    """
    chosen = tuple(run.tasks) if order is None else order
    problems = list(_problems(run, masks, chosen))
    if problems:
        raise ConfigError("\n".join(problems))
    chain: list[Job] = []
    for task in chosen:
        before = [job.settings["task"] for job in chain]
        chain.append(train_job(run, task, chain[-1:], {"before": before, "masks": masks}))
    stages = [evaluate_job(run, job.settings["task"], job) for job in chain]
    return [*chain, evaluate_job(run, "base", None), *stages]


def _problems(run: Run, masks: str, order: Sequence[str]) -> Iterator[str]:
    if sorted(order) != sorted(run.tasks):
        yield f"multitask.order: got {', '.join(order) or 'nothing'}; wanted each of {', '.join(run.tasks)} once"
    if run.evaluate.tasks == "own":
        yield (
            "evaluate.tasks: got own, and what a sequence did to its tasks is known from all of them after each; "
            "set it to all"
        )
    if len(run.tasks) < 2:
        yield f"tasks: a sequence needs at least two, got {', '.join(run.tasks)} alone; add one"
    if not run.adapter.share_projection:
        yield "adapter.share_projection: is false, and tasks in sequence have one A; set it to true"
    if masks == "disjoint" and run.adapter.form.name != "lori":
        yield (
            f"multitask.masks: got disjoint, which is for the form lori, and adapter.form is {run.adapter.form.name}; "
            "set it to independent"
        )
    if run.merges:
        yield f"merges: got {', '.join(run.merges)}, and the last adapter has all tasks; remove merges"
    count, most = len(run.tasks), int(1 / run.adapter.density + 1e-9)
    if masks == "disjoint" and count > most:
        yield (
            f"adapter.density: got {run.adapter.density:g}, and masks that have no entry in common are at most "
            f"{most} then; give {1000 // count / 1000:g} or less for {count} tasks, or independent masks"
        )
