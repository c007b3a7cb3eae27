"""The evaluation of a run as text for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lori_dist.scores import Evaluation, Intervals


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


FORMATS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", lambda value: f"{value:.3f}"),
    "exact_match": ("exact_match, %", _share),
    "refusal": ("refusal, %", _share),
    **{name: (f"{name}, %", _share) for name in ("choice", "choice_norm", "choice_bytes", "choice_end")},
}
"""Metric -> heading and how a value reads. Metrics of the user's own are shown under their name, with four digits."""


def table(evaluation: Evaluation, intervals: Intervals | None = None) -> str:
    """One table a metric, models down and tasks across in their given order, with the mean over the tasks at the right.

    A task that a metric does not apply to has no column; a value that is missing is `-`, and so is then the mean.
    intervals: shown behind the values that have one.
    """
    metrics = dict.fromkeys(metric for tasks in evaluation.values() for values in tasks.values() for metric in values)
    return "\n\n".join(_table(evaluation, metric, intervals or {}) for metric in metrics)


def compared(result: Mapping[str, Any]) -> str:
    """The result of `cluster.comparison.compare` as a table: mean +- standard deviation, with the interval of shares,
    and what each row took; below it, what grids have found."""
    heading, shown = FORMATS.get(result["metric"], (result["metric"], "{:.4g}".format))
    columns = [*result["tasks"]]

    def cell(row: Mapping[str, Any], task: str) -> str:
        if task not in row["mean"]:
            return "-"
        limits = _limits(row.get("interval", {}).get(task), shown)
        return f"{shown(row['mean'][task])} +- {shown(row['std'][task])}{limits}"

    lines = [[f"{heading}, seeds {', '.join(map(str, result['seeds']))}", *columns, "trained", "bytes", "s/step"]]
    for name, row in result["rows"].items():
        scores = [cell(row, task) for task in columns]
        costs = [
            "-" if row[key] is None else written.format(row[key])
            for key, written in (("trained", "{:,.0f}"), ("bytes", "{:,.0f}"), ("step_seconds", "{:.3g}"))
        ]
        lines.append([name, *scores, *costs])
    tuned = [
        f"{name}: {' '.join(found['settings'])}, best on validation rows of {', '.join(map(shown, found['scores']))}"
        for name, found in result.get("tuned", {}).items()
    ]
    return "\n".join([_lines(lines), *([""] if tuned else []), *tuned])


def _table(evaluation: Evaluation, metric: str, intervals: Intervals) -> str:
    heading, shown = FORMATS.get(metric, (metric, "{:.4g}".format))
    tasks = list(dict.fromkeys(task for rows in evaluation.values() for task in rows if metric in rows[task]))
    lines = [[heading, *tasks, "mean"]]
    for model, rows in evaluation.items():
        values = [rows.get(task, {}).get(metric) for task in tasks]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) else None
        limits = [intervals.get(model, {}).get(task, {}).get(metric) for task in tasks]
        cells = [
            "-" if value is None else f"{shown(value)}{_limits(limit, shown)}"
            for value, limit in zip([*values, mean], [*limits, None], strict=True)
        ]
        lines.append([model, *cells])
    return _lines(lines)


def _limits(limits: Sequence[float] | None, shown: Callable[[float], str]) -> str:
    return "" if limits is None else f" [{shown(limits[0])}, {shown(limits[1])}]"


def _lines(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *values = cells
    aligned = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
    return "  ".join([name.ljust(widths[0]), *aligned])
