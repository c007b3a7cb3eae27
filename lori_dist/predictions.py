"""Predictions of models side by side: the rows that one model gets right and another wrong."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist.errors import ConfigError, JobError
from lori_dist.folder import read_lines
from lori_dist.plugin import nearest
from lori_dist.scores import LOWER_IS_BETTER, PREDICTIONS

Rows = dict[int, Mapping[str, Any]]
"""Number of a test row, from 1 -> its line of predictions.jsonl."""
Predictions = dict[str, dict[str, dict[str, Rows]]]
"""Task -> metric -> model -> rows."""

JOBS = "evaluate-"
BASE = "base"


def is_of_run(folder: Path) -> bool:
    """Whether a folder is that of a run, and not of an adapter."""
    return (folder / "summary.json").is_file() or any(folder.glob(f"{JOBS}*"))


def files(folder: Path) -> list[Path]:
    """The predictions of each model in a run's folder, without those of other settings, which are kept."""
    return [path for path in sorted(folder.glob(f"{JOBS}*/{PREDICTIONS}")) if "." not in path.parent.name]


def read(place: Path) -> Predictions:
    """The predictions in a run's folder, or in a file that `lori evaluate --out` wrote.

    Raises JobError if there are none, or for files that cannot be read.
    """
    found: Predictions = {}
    for path in files(place) if place.is_dir() else [place]:
        model = path.parent.name.removeprefix(JOBS) if place.is_dir() else None
        lines, _ = read_lines(path)
        for line in lines:
            try:
                name = str(line["model"]) if model is None else model
                of_metric = found.setdefault(str(line["task"]), {}).setdefault(str(line["metric"]), {})
                of_metric.setdefault(name, {})[int(line["row"])] = {**line, "score": float(line["score"])}
            except (LookupError, TypeError, ValueError):
                raise JobError(f"{path}: a line is not a prediction: {str(line)[:80]!r}") from None
    if not found:
        where = "no evaluation in it has finished" if place.is_dir() else "it has no line"
        raise JobError(
            f"{place}: there are no predictions, as {where}; `lori run` and `lori evaluate --out` write them"
        )
    return found


def compared(
    predictions: Predictions,
    *,
    tasks: Sequence[str] = (),
    metric: str | None = None,
    right: str | None = None,
    wrong: str | None = None,
    number: int = 3,
) -> list[dict[str, Any]]:
    """Pairs of models on each task, as plain JSON: task, metric, right, wrong; counts of rows: rows, both, only_right,
    only_wrong, neither; and examples, at most `number` of the rows that `right` gets right and `wrong` wrong, in their
    order: row, prompt, answer, and what each model wrote or chose.

    tasks: all by default. metric: by default the first of a task that is a share of rows. right, wrong: models; with
    one of them, all others are compared with it, and with neither, each task's own adapter with the merges, or with the
    base where there are none. Of a metric that is not 0 or 1, the rows on which one model is better than the other
    count; those with the largest difference come first.
    Raises ConfigError for a task, a metric or a model without predictions.
    """
    _check("--task", tasks, predictions)
    found = []
    for task in tasks or predictions:
        of_task = predictions[task]
        if metric is not None and metric not in of_task:
            if tasks:
                _check("--metric", [metric], of_task)
            continue
        chosen = metric or next((name for name in of_task if name not in LOWER_IS_BETTER), None)
        if chosen is None:
            continue
        models = of_task[chosen]
        _check("--right", [right] if right is not None else [], models)
        _check("--wrong", [wrong] if wrong is not None else [], models)
        for one, other in _pairs(task, models, predictions, right, wrong):
            found.append({"task": task, "metric": chosen} | _compared(chosen, models, one, other, number))
    if metric is not None and not found and not any(metric in of_task for of_task in predictions.values()):
        _check("--metric", [metric], {name for of_task in predictions.values() for name in of_task})
    return found


def _check(where: str, names: Sequence[str], there: Mapping[str, Any] | set[str]) -> None:
    for name in names:
        if name not in there:
            listing = ", ".join(sorted(there))
            raise ConfigError(
                f"{where}: there are no predictions of {name!r}; there are {listing}.{nearest(name, there)}"
            )


def _pairs(
    task: str, models: Mapping[str, Rows], tasks: Mapping[str, Any], right: str | None, wrong: str | None
) -> Iterator[tuple[str, str]]:
    if right is not None and wrong is not None:
        yield right, wrong
    elif right is not None:
        yield from ((right, model) for model in models if model != right)
    elif wrong is not None:
        yield from ((model, wrong) for model in models if model != wrong)
    else:
        merges = [model for model in models if model != BASE and model not in tasks]
        if task in models:
            yield from ((task, model) for model in merges or [one for one in models if one == BASE])
        elif BASE in models:
            yield from ((model, BASE) for model in merges)


def _compared(metric: str, models: Mapping[str, Rows], right: str, wrong: str, number: int) -> dict[str, Any]:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    one, other = models[right], models[wrong]
    rows = [row for row in sorted(one) if row in other and one[row].get("prompt") == other[row].get("prompt")]
    gain = {row: sign * (one[row]["score"] - other[row]["score"]) for row in rows}
    better = sorted((row for row in rows if gain[row] > 0), key=lambda row: (-gain[row], row))
    equal = [row for row in rows if gain[row] == 0]
    both = sum(one[row]["score"] > 0 for row in equal)
    return {
        "right": right,
        "wrong": wrong,
        "rows": len(rows),
        "both": both,
        "only_right": len(better),
        "only_wrong": len(rows) - len(better) - len(equal),
        "neither": len(equal) - both,
        "examples": [
            {
                "row": row,
                "prompt": one[row].get("prompt"),
                "answer": one[row].get("answer"),
                "right": one[row].get("response"),
                "wrong": other[row].get("response"),
                "scores": [one[row]["score"], other[row]["score"]],
            }
            for row in better[:number]
        ],
    }
