"""One adapter for all tasks, with any balance of their gradients."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from lori_dist import plugin
from lori_dist.config import Run, is_per_task, of_form
from lori_dist.errors import ConfigError
from lori_dist.jobs import JOINT, Job, evaluate_job, joint_job, merge_job
from lori_dist.plugin import nearest


def plan(
    run: Run,
    *,
    balance: str | dict[str, float | int | bool | str] | None = None,
    projection: Literal["original", "in_place", "none"] | None = None,
    granularity: Literal["matrix", "layer", "type", "global"] | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    seed: Annotated[int, "[0, inf)"] = 0,
    weights: dict[str, float] | None = None,
    sampling: Literal["equal", "proportional"] | dict[str, float] = "equal",
    temperature: Annotated[float, "[1, inf)"] | None = None,
    cap: Annotated[int, "[1, inf)"] | None = None,
) -> list[Job]:
    """One training on batches of all tasks, whose gradients a balance makes into one, and its evaluation; with a form
    that has an update for each task, also merges of these.

    What is minimised is the sum over tasks of weight * mean loss of a target token. balance: a file of
    `lori_dist/balances`, by name or as {name: ..., its options}: `ortho` by default, which takes out of a task's
    gradient what opposes another one; `none` is plain joint training. projection: the older name of two of them: what
    `ortho` projects against, or `none`. granularity: where gradients are compared: in each A and each B apart, in a
    layer, in all A and in all B, or in everything; by default `matrix` with `ortho`, else `global`. reduce: what is
    made of the weighted gradients. seed: of the order in which tasks give way, drawn in each step. weights: by task; by
    default 1. sampling: every batch has at least one row of each task: equally many (`equal`), by the tasks' numbers of
    rows (`proportional`), or by shares, task -> number. Unless equal, a task's loss counts by its share of the rows.
    temperature: of `proportional`, numbers of rows to the power 1 / temperature; by default 1. cap: of `proportional`,
    rows of a task that count at most.
    Raises ConfigError, with every mistake, for a run that this cannot be.
    """
    given = weights or {}
    problems = list(_problems(run, given))
    name, options, found = _balance(balance, projection, granularity)
    problems += [*found, *_of_penalty(run, name), *_of_sampling(run, sampling, temperature, cap)]
    if problems:
        raise ConfigError("\n".join(problems))
    joint: dict[str, Any] = {
        "tasks": list(run.tasks),
        "weights": [float(given.get(task, 1.0)) for task in run.tasks],
        # In the words of runs from before there were other balances: these are the same trainings.
        **(
            {"projection": {"none": "none", "ortho": options.get("against", "original")}[name]}
            if name in ("none", "ortho")
            else {"balance": {"name": name, "options": options}}
        ),
        "granularity": granularity or ("matrix" if name in ("none", "ortho") else _granularities(name)[0]),
        "reduce": reduce,
        "seed": seed,
    }
    if isinstance(sampling, dict):
        joint["sampling"] = {"shares": [float(sampling[task]) for task in run.tasks]}
    elif sampling == "proportional":
        joint["sampling"] = {"temperature": temperature or 1.0, "cap": cap}
    trained = joint_job(run, joint)
    merged = {name: merge_job(run, name, dict.fromkeys(run.tasks, trained)) for name in run.merges}
    made: dict[str, Job | None] = {"base": None, JOINT: trained, **merged}
    return [trained, *merged.values(), *(evaluate_job(run, model, job) for model, job in made.items())]


def _balance(
    balance: str | dict[str, float | int | bool | str] | None, projection: str | None, granularity: str | None
) -> tuple[str, dict[str, Any], list[str]]:
    """The name and options of the balance, and their mistakes."""
    if projection is not None:
        both = ["multitask.projection: is an older name for a balance, and balance is given; set only one"]
        options = {} if projection == "none" else {"against": projection}
        return "none" if projection == "none" else "ortho", options, both if balance is not None else []
    chosen: dict[str, Any] = {"name": balance or "ortho"} if not isinstance(balance, dict) else dict(balance)
    name = chosen.pop("name", None)
    if not isinstance(name, str):
        return "ortho", {}, [f"multitask.balance.name: got {name!r}; wanted the name of a balance"]
    try:
        options = plugin.find("balances", name, "balance", "multitask.balance").bind(chosen, "multitask.balance")
    except ConfigError as error:
        return "ortho", {}, [str(error)]
    known = _granularities(name)
    if granularity is not None and name != "none" and granularity not in known:
        problem = f"multitask.granularity: got {granularity!r}, and {name} takes {', '.join(known)}"
        return name, options, [f"{problem}; {'remove it' if len(known) == 1 else 'set one of these'}"]
    return name, options, []


def _of_penalty(run: Run, balance: str) -> Iterator[str]:
    form = run.adapter.form
    method = plugin.find("forms", form.name, "form", "adapter.form")
    option = method.constants.get("PENALTY")
    if option is None or balance == "none" or of_form(run, "IN_SEQUENCE"):  # which then compares tasks of a sequence
        return
    if form.options.get(option, method.options[option].default):
        yield (
            f"multitask.balance: got {balance}, and the penalty of adapter.form {form.name} is not the gradient of a "
            f"task; set it to none, or adapter.form.{option} to 0"
        )


def _granularities(balance: str) -> Sequence[str]:
    """The units that a balance can have, its default first."""
    found = plugin.find("balances", balance, "balance", "multitask.balance").constants.get("GRANULARITY", ("global",))
    return tuple(found)


def _of_sampling(
    run: Run, sampling: str | dict[str, float], temperature: float | None, cap: int | None
) -> Iterator[str]:
    for option, value in (("temperature", temperature), ("cap", cap)):
        if value is not None and sampling != "proportional":
            yield f"multitask.{option}: got {value:g}, and only sampling proportional has one; remove it"
    if not isinstance(sampling, dict):
        return
    for task, share in sampling.items():
        if task not in run.tasks:
            yield (
                f"multitask.sampling.{task}: unknown task; there are {', '.join(run.tasks)}.{nearest(task, run.tasks)}"
            )
        if not 0 < share < math.inf:
            yield f"multitask.sampling.{task}: got {share:g}; wanted a finite number above 0"
    if missing := [task for task in run.tasks if task not in sampling]:
        yield f"multitask.sampling: has no share for {', '.join(missing)}; give every task one"


def _problems(run: Run, weights: dict[str, float]) -> Iterator[str]:
    if len(run.tasks) < 2:
        yield f"tasks: joint training needs at least two, got {', '.join(run.tasks)} alone; add one"
    if JOINT in run.tasks:
        yield f"tasks.{JOINT}: is the name of the adapter that all tasks have; give the task another name"
    if run.merges and not is_per_task(run):
        yield f"merges: got {', '.join(run.merges)}, and joint training makes one adapter; remove merges"
    if JOINT in run.merges:
        yield f"merges.{JOINT}: is the name of the adapter that is trained; give the merge another name"
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
        if task_of_run.seed is not None and not of_form(run, "OWN_A"):
            yield (
                f"tasks.{name}.seed: is the seed of a task's own A, but joint training has one A for all tasks; set "
                "adapter.seed"
            )
