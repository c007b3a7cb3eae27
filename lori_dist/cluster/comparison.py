"""Methods side by side: runs of one configuration that differ in a few settings, each with several seeds."""

import json
import logging
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lori_dist import config, folder, plugin, storage
from lori_dist.atomic import write_text
from lori_dist.config import Name, Run, Seed, Text, section
from lori_dist.errors import ConfigError, JobError, LoriError, Stopped
from lori_dist.files import parse_json, read_regular
from lori_dist.jobs import plan
from lori_dist.scores import LOWER_IS_BETTER, wilson

log = logging.getLogger(__name__)

OWN = "own"
"""The name that stands, on each task, for the adapter that was trained on it."""

MEAN = "mean"
"""The column of the mean over the tasks."""

Scores = Mapping[str, Mapping[str, float]]
"""Row -> task -> value."""

Summary = Mapping[str, Any]
"""What is in the summary.json of a run."""


@section
class Variant:
    """A way to run the configuration."""

    settings: tuple[Text, ...] = ()
    """Overrides, as on the command line."""
    grid: tuple[Annotated[tuple[Text, ...], pydantic.Field(min_length=1)], ...] = ()
    """Overrides that are tried first, each list in a run with the first seed on the tasks' validation rows, without
    merges. The runs of all seeds have the list whose mean over the tasks is best."""
    tuned_as: Name | None = None
    """An earlier variant, the best of whose grid this one takes."""
    seeds: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] | None = None
    """Seeds of this variant; null: those of the comparison."""
    rows: Annotated[dict[Text, Text], pydantic.Field(min_length=1)]
    """Row of the table -> model of the run: `base`, `own`, a merge, a task, or `joint`."""


@section
class Comparison:
    """A comparison as its YAML file describes it."""

    name: Name
    """The runs are called NAME-VARIANT-SEED, and NAME-VARIANT-grid-NUMBER those of a grid; the result is NAME.json."""
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
    """(variant, seed) -> its run, without what a grid is yet to find. Raises ConfigError that lists the mistakes of all
    variants, of their grids too."""
    found: dict[tuple[str, int], Run] = {}
    problems = list(_problems_of_grids(comparison))
    for name, variant in comparison.variants.items():
        try:
            for number in range(len(variant.grid)):
                _of_grid(comparison, name, number, overrides)
            for seed in _seeds(comparison, name):
                run = _of_seed(comparison, name, seed, (), overrides)
                problems += _rows(run, name, variant, comparison.metric)
                found[name, seed] = run
        except ConfigError as error:
            problems += [f"variants.{name}: {line}" for line in str(error).split("\n")]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def planned(comparison: Comparison) -> list[str]:
    """The names of all runs, in the order in which `compare` does them."""
    names = []
    for name, variant in comparison.variants.items():
        names += [_name(comparison, name, f"grid-{number}") for number in range(len(variant.grid))]
        names += [_name(comparison, name, seed) for seed in _seeds(comparison, name)]
    return names


def _seeds(comparison: Comparison, name: str) -> tuple[int, ...]:
    own = comparison.variants[name].seeds
    return comparison.seeds if own is None else own


def _of_seed(comparison: Comparison, name: str, seed: int, tuned: Sequence[str], overrides: Sequence[str]) -> Run:
    """tuned: what the variant's grid has found."""
    of_seed = [f"name={_name(comparison, name, seed)}", f"adapter.seed={seed}", f"train.seed={seed}"]
    return config.load(comparison.config, [*comparison.variants[name].settings, *tuned, *overrides, *of_seed])


def _of_grid(comparison: Comparison, name: str, number: int, overrides: Sequence[str]) -> Run:
    """The run that tries one list of a variant's grid: its test rows are the tasks' validation rows."""
    variant = comparison.variants[name]
    run = _of_seed(comparison, name, _seeds(comparison, name)[0], variant.grid[number], overrides)
    run = replace(run, name=_name(comparison, name, f"grid-{number}"), merges={})
    for task, of_run in run.tasks.items():
        if of_run.validation is None:
            raise ConfigError(f"tasks.{task}.validation: is not set, and a grid is tried on those rows; give a file")
    if _tried(variant, _models(run)) is None:
        raise ConfigError("grid: no row is of a model that is trained, so there is nothing to tune; remove it")
    tasks = {task: replace(of_run, test=str(of_run.validation)) for task, of_run in run.tasks.items()}
    return replace(run, tasks=tasks)


def _name(comparison: Comparison, variant: str, last: int | str) -> str:
    return f"{comparison.name}-{variant}-{last}"


def _problems_of_grids(comparison: Comparison) -> Iterator[str]:
    sizes: dict[str, int] = {}
    for name, variant in comparison.variants.items():
        if variant.grid:
            sizes[name] = len(variant.grid)
        if variant.tuned_as is None:
            continue
        place = f"variants.{name}.tuned_as"
        if variant.grid:
            yield f"{place}: is given, and so is a grid; set only one of them"
        elif variant.tuned_as not in sizes:
            known, near = ", ".join(sizes) or "none", plugin.nearest(variant.tuned_as, sizes)
            yield f"{place}: got {variant.tuned_as!r}; wanted an earlier variant with a grid: {known}.{near}"
    names = planned(comparison)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"variants: two of their runs would be called {', '.join(repeated)}; rename a variant"
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield f"variants: their grids differ in size ({listed}), so that some are tuned more; give all as many lists"


def _tried(variant: Variant, models: Collection[str]) -> str | None:
    """The model by which a run of a grid is judged: that of the first row of one that is trained."""
    return next((model for model in variant.rows.values() if model in models and model != "base"), None)


def _models(run: Run) -> list[str]:
    """What a row can be of."""
    measured = [job.settings["subject"] for job in plan(run) if job.kind == "evaluate"]
    return [*measured, *([OWN] if set(run.tasks) <= set(measured) else [])]


def _rows(run: Run, name: str, variant: Variant, metric: str) -> Iterator[str]:
    known = _models(run)
    for row, model in variant.rows.items():
        if model not in known:
            near = plugin.nearest(model, known)
            yield f"variants.{name}.rows.{row}: unknown model {model!r}; there are {', '.join(known)}.{near}"
    if metric not in run.evaluate.metrics:
        yield f"metric: {metric} is not measured; there are {', '.join(run.evaluate.metrics)}"


def compare(
    comparison: Comparison, overrides: Sequence[str] = (), *, execute: Callable[[Run], Summary]
) -> dict[str, Any]:
    """Does all runs, one after another, and skips finished ones: jobs, too, that another run in `output` has finished
    with the same fingerprint, which are copied. Returns what `result` makes of them, which is also written to
    OUTPUT/NAME.json, with its `path`.

    execute: does a run and returns its summary. Raises ConfigError before anything is done, JobError where runs failed,
    after all others, and at once what `execute` raises when a run is stopped: the same call resumes it.
    """
    described = runs(comparison, overrides)
    summaries: dict[str, Summary] = {}
    failed: list[str] = []
    for run in _in_turn(comparison, overrides, summaries):
        try:
            _take_finished(run)
            summaries[run.name] = execute(run)
        except Stopped:
            raise
        except LoriError as error:
            failed.append(f"{run.name}: {error}")
    if failed:
        raise JobError("\n".join([*failed, "the other runs are done; the same command does what is missing"]))
    found = result(comparison, summaries)
    path = next(iter(described.values())).folder.parent / f"{comparison.name}.json"
    _keep_another(path, found)
    write_text(path, json.dumps(found, indent=2) + "\n")
    return {**found, "path": str(path)}


def _in_turn(comparison: Comparison, overrides: Sequence[str], summaries: Mapping[str, Summary]) -> Iterator[Run]:
    """Yields each run when it can be done: those of a variant's seeds after its grid's. summaries: by the runs' names,
    of those that are done; those of a grid that has none of a run are left out."""
    for name, variant in comparison.variants.items():
        yield from (_of_grid(comparison, name, number, overrides) for number in range(len(variant.grid)))
        tuned = best_of_grid(comparison, name, summaries)
        if tuned is not None:
            yield from (_of_seed(comparison, name, seed, tuned[0], overrides) for seed in _seeds(comparison, name))


def best_of_grid(
    comparison: Comparison, name: str, summaries: Mapping[str, Summary]
) -> tuple[tuple[str, ...], list[float]] | None:
    """The list of a grid, a variant's own or that it is tuned as, with the best mean over the tasks, the first of
    several; and the mean of each. Empty lists for a variant without a grid, None if not all of it has been tried."""
    source = comparison.variants[name].tuned_as or name
    variant = comparison.variants[source]
    values = []
    for number in range(len(variant.grid)):
        summary = summaries.get(_name(comparison, source, f"grid-{number}"))
        if summary is None:
            return None
        model = _tried(variant, [*summary["evaluation"], OWN])
        assert model is not None
        values.append(_scores(summary["evaluation"], model, comparison.metric)[MEAN])
    if not values:
        return (), []
    best = min(values) if comparison.metric in LOWER_IS_BETTER else max(values)
    return variant.grid[values.index(best)], values


def _take_finished(run: Run) -> None:
    """Copies the jobs that runs beside this one have finished with the same fingerprints."""
    if storage.is_url(run.output) or not run.folder.parent.is_dir():
        return
    others = [place for place in sorted(run.folder.parent.iterdir()) if place.is_dir() and place != run.folder]
    for job in plan(run):
        if (run.folder / job.name).exists():
            continue
        if (place := next((one for one in others if folder.has_finished(one, job)), None)) is not None:
            with folder.lock(run.folder):
                folder.take(run.folder, job, place)
            log.info("%s: %s is that of %s", run.name, job.name, place.name)


def states(comparison: Comparison, overrides: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yields each run's name, in the order in which `compare` does them, and what is finished of it. Nothing is started
    or written. Raises ConfigError as `runs`."""
    described = runs(comparison, overrides)
    summaries: dict[str, Summary] = {}
    shown = set()
    for run in _in_turn(comparison, overrides, summaries):
        jobs = plan(run)
        done = sum(folder.finished(run.folder, job) is not None for job in jobs)
        if done == len(jobs) and (path := run.folder / "summary.json").is_file():
            summaries[run.name] = parse_json(read_regular(path))
        shown.add(run.name)
        yield run.name, f"{done} of {len(jobs)} jobs are finished" if done < len(jobs) else "finished"
    for run in described.values():
        if run.name not in shown:
            yield run.name, "after its grid"


def result(comparison: Comparison, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """What runs have found, from their summaries by name; of those that there are.

    It has `metric`, `seeds` and `tasks`; `test_rows`, task -> their number; `tuned`, variant -> `settings`, the best
    list of its grid, and `scores`, the mean over the tasks of each list; and of each row of the table the `scores` of
    every seed (task -> value, `mean` over the tasks among them), their `mean` and `std` over the seeds (task -> value;
    the sample's, 0 with one seed), `interval` (task -> the 95% interval of a mean that is a share of rows, by Wilson,
    as if one model had it on these rows), and, as means over the seeds, the entries that were `trained` and the `bytes`
    of the adapter files, over all tasks' adapters where each has one, and the `step_seconds` of a training; null where
    a model has none.
    """
    scores: dict[str, list[dict[str, float]]] = {}
    costs: dict[str, list[dict[str, float | None]]] = {}
    tuned: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    shares: set[str] = set()
    for name, variant in comparison.variants.items():
        if variant.grid and (best := best_of_grid(comparison, name, summaries)) is not None:
            tuned[name] = {"settings": list(best[0]), "scores": best[1]}
        names = [_name(comparison, name, seed) for seed in _seeds(comparison, name)]
        for summary in (summaries[name] for name in names if name in summaries):
            numbers |= summary.get("test_rows", {})
            for of_model in summary.get("intervals", {}).values():
                shares |= {task for task, of_task in of_model.items() if comparison.metric in of_task}
            for row, model in variant.rows.items():
                scores.setdefault(row, []).append(_scores(summary["evaluation"], model, comparison.metric))
                costs.setdefault(row, []).append(_costs(summary, model))
    tasks = [task for task in dict.fromkeys(task for each in scores.values() for task in each[0]) if task != MEAN]
    limited = {task: numbers[task] for task in tasks if task in numbers and task in shares}
    return {
        "metric": comparison.metric,
        "seeds": list(comparison.seeds),
        "tasks": [*tasks, MEAN],
        "test_rows": {task: numbers[task] for task in tasks if task in numbers},
        "tuned": tuned,
        "rows": {row: {**_over_seeds(each, limited), **_mean_costs(costs[row])} for row, each in scores.items()},
    }


def _keep_another(path: Path, result: Mapping[str, Any]) -> None:
    """Renames an earlier comparison of this name that has other results."""
    if path.exists() and read_regular(path).strip() != json.dumps(result, indent=2).encode():
        [kept] = folder.set_aside(path.parent, [path.name])
        log.warning("%s: an earlier comparison with other results is kept as %s", path, kept)


def _scores(evaluation: Mapping[str, Scores], model: str, metric: str) -> dict[str, float]:
    """Of the tasks that the model was measured on."""
    found = {task: evaluation[task if model == OWN else model].get(task, {}) for task in evaluation["base"]}
    values = {task: of_task[metric] for task, of_task in found.items() if metric in of_task}
    if not values:
        raise JobError(f"metric: {metric} is not defined on any task that {model} was measured on; give another metric")
    return {**values, MEAN: statistics.fmean(values.values())}


COSTS = ("trained", "bytes", "step_seconds")


def _costs(summary: Summary, model: str) -> dict[str, float | None]:
    """What a model took: for `own`, all adapters together, but the time of a mean step."""
    made = {**summary.get("adapters", {}), **summary.get("merges", {})}
    results = [made[name] for name in (summary["evaluation"]["base"] if model == OWN else [model]) if name in made]
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


def _over_seeds(scores: Sequence[Mapping[str, float]], rows: Mapping[str, int]) -> dict[str, Any]:
    """rows: task -> number of test rows, where the metric is a share of them."""
    columns = {task: [of_seed[task] for of_seed in scores] for task in scores[0]}
    means = {task: statistics.fmean(values) for task, values in columns.items()}
    return {
        "scores": [dict(of_seed) for of_seed in scores],
        "mean": means,
        "interval": {task: list(wilson(means[task], rows[task])) for task in means if task in rows},
        "std": {task: statistics.stdev(values) if len(values) > 1 else 0.0 for task, values in columns.items()},
    }
