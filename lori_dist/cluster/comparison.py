"""Methods side by side: runs of one configuration that differ in a few settings, each with several seeds."""

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lori_dist import config, folder, plugin
from lori_dist.atomic import write_text
from lori_dist.config import Name, Run, Seed, Text, section
from lori_dist.errors import ConfigError, JobError, LoriError
from lori_dist.files import read_regular
from lori_dist.jobs import plan

log = logging.getLogger(__name__)

OWN = "own"
"""The name that stands, on each task, for the adapter that was trained on it."""

Scores = Mapping[str, Mapping[str, float]]
"""Row -> task -> value."""


@section
class Variant:
    """A way to run the configuration."""

    settings: tuple[Text, ...] = ()
    """Overrides, as on the command line."""
    rows: Annotated[dict[Text, Text], pydantic.Field(min_length=1)]
    """Row of the table -> model of the run: `base`, `own`, a merge, a task, or `joint`."""


@section
class Comparison:
    """A comparison as its YAML file describes it."""

    name: Name
    """The runs are called NAME-VARIANT-SEED, the result NAME.json."""
    config: Text
    """A YAML file of a run."""
    seeds: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] = (0, 1, 2)
    """Seeds of A and of the order of the rows."""
    metric: Text = "exact_match"
    variants: Annotated[dict[Name, Variant], pydantic.Field(min_length=1)]


def load(path: str | Path) -> Comparison:
    """The comparison a YAML file describes. Raises ConfigError that lists every mistake by its path."""
    tree = config.read(path)
    if not isinstance(tree, dict):
        wanted = "wanted name, config, seeds, metric and variants, as in configs/comparison.yaml"
        raise ConfigError(f"{path}: holds {type(tree).__name__}; {wanted}")
    return config.checked(Comparison, tree, str(path))


def runs(comparison: Comparison, overrides: Sequence[str] = ()) -> dict[tuple[str, int], Run]:
    """(variant, seed) -> its run. Raises ConfigError that lists the mistakes of all variants."""
    found: dict[tuple[str, int], Run] = {}
    problems: list[str] = []
    for name, variant in comparison.variants.items():
        for seed in comparison.seeds:
            of_seed = [f"name={comparison.name}-{name}-{seed}", f"adapter.seed={seed}", f"train.seed={seed}"]
            try:
                run = config.load(comparison.config, [*variant.settings, *overrides, *of_seed])
                problems += _rows(run, name, variant, comparison.metric)
            except ConfigError as error:
                problems += [f"variants.{name}: {line}" for line in str(error).split("\n")]
                break
            found[name, seed] = run
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def _rows(run: Run, name: str, variant: Variant, metric: str) -> Iterator[str]:
    measured = [job.settings["subject"] for job in plan(run) if job.kind == "evaluate"]
    known = [*measured, *([OWN] if set(run.tasks) <= set(measured) else [])]
    for row, model in variant.rows.items():
        if model not in known:
            near = plugin.nearest(model, known)
            yield f"variants.{name}.rows.{row}: unknown model {model!r}; there are {', '.join(known)}.{near}"
    if metric not in run.evaluate.metrics:
        yield f"metric: {metric} is not measured; there are {', '.join(run.evaluate.metrics)}"


def compare(
    comparison: Comparison, overrides: Sequence[str] = (), *, execute: Callable[[Run], Mapping[str, Any]]
) -> dict[str, Any]:
    """Does all runs, one after another, and skips finished ones. Returns what is also written to OUTPUT/NAME.json.

    execute: does a run and returns its summary. The result has `metric`, `seeds`, `tasks`, and of each row of the
    table the `scores` of every seed (task -> value, `mean` over the tasks among them), their `mean` and `std` over the
    seeds (task -> value; the sample's, 0 with one seed), and, as means over the seeds, the entries that were `trained`
    and the `bytes` of the adapter files, over all tasks' adapters where each has one, and the `step_seconds` of a
    training; null where a model has none.
    Raises ConfigError before anything is done, JobError where runs failed, after all others.
    """
    described = runs(comparison, overrides)
    scores: dict[str, list[dict[str, float]]] = {}
    costs: dict[str, list[dict[str, float | None]]] = {}
    failed = []
    for (name, _), run in described.items():
        try:
            summary = execute(run)
        except LoriError as error:
            failed.append(f"{run.name}: {error}")
            continue
        for row, model in comparison.variants[name].rows.items():
            scores.setdefault(row, []).append(_scores(summary["evaluation"], model, comparison.metric))
            costs.setdefault(row, []).append(_costs(summary, run, model))
    if failed:
        raise JobError("\n".join([*failed, "the other runs are done; the same command does what is missing"]))
    tasks = list(dict.fromkeys(task for of_seeds in scores.values() for values in of_seeds for task in values))
    result = {
        "metric": comparison.metric,
        "seeds": list(comparison.seeds),
        "tasks": tasks,
        "rows": {row: {**_over_seeds(of_seeds), **_mean_costs(costs[row])} for row, of_seeds in scores.items()},
    }
    first = next(iter(described.values()))
    path = first.folder.parent / f"{comparison.name}.json"
    _keep_another(path, result)
    write_text(path, json.dumps(result, indent=2) + "\n")
    return {**result, "path": str(path)}


def _keep_another(path: Path, result: Mapping[str, Any]) -> None:
    """Renames an earlier comparison of this name that has other results."""
    if path.exists() and read_regular(path).strip() != json.dumps(result, indent=2).encode():
        [kept] = folder.set_aside(path.parent, [path.name])
        log.warning("%s: an earlier comparison with other results is kept as %s", path, kept)


def _scores(evaluation: Mapping[str, Scores], model: str, metric: str) -> dict[str, float]:
    tasks = [task for task in evaluation["base"] if metric in evaluation["base"][task]]
    values = {task: evaluation[task if model == OWN else model][task][metric] for task in tasks}
    return {**values, "mean": statistics.fmean(values.values())}


COSTS = ("trained", "bytes", "step_seconds")


def _costs(summary: Mapping[str, Any], run: Run, model: str) -> dict[str, float | None]:
    """What a model took: for `own`, all adapters together, but the time of a mean step."""
    made = {**summary.get("adapters", {}), **summary.get("merges", {})}
    results = [made[name] for name in (run.tasks if model == OWN else [model]) if name in made]
    found: dict[str, float | None] = {}
    for key in COSTS:
        found[key] = _over([result.get(key) for result in results], statistics.fmean if key == "step_seconds" else sum)
    return found


def _mean_costs(of_seeds: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {key: _over([one[key] for one in of_seeds], statistics.fmean) for key in COSTS}


def _over(values: Sequence[float | None], function: Callable[[Sequence[float]], float]) -> float | None:
    """What a function makes of values. None if there are none, or one is missing."""
    known = [value for value in values if value is not None]
    return function(known) if known and len(known) == len(values) else None


def _over_seeds(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    columns = {task: [of_seed[task] for of_seed in scores] for task in scores[0]}
    return {
        "scores": [dict(of_seed) for of_seed in scores],
        "mean": {task: statistics.fmean(values) for task, values in columns.items()},
        "std": {task: statistics.stdev(values) if len(values) > 1 else 0.0 for task, values in columns.items()},
    }
