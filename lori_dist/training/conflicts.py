"""Figures of conflicts between tasks in joint training: in a step's record, in a line of a file of its own, and at the
end, for people, over all steps."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lori_dist.training.surgery import Conflicts

FILE = "conflicts.jsonl"
DIGITS = 4
"""Digits of cosines in files."""


def figures(conflicts: Conflicts, tasks: Sequence[str]) -> dict[str, Any]:
    """A part of a step's record.

    conflicts: two tasks, joined by `+` -> the cosine of their gradients and the share of units where they oppose each
    other. removed: |sum of gradients - what was made of them| / |sum of gradients|. task_weights: task -> what its
    gradient was multiplied by. exchanged_bytes: what ranks sent for it.
    """
    return {
        "conflicts": {
            "+".join(pair): {"cosine": _short(cosine), "share": _short(conflicts.shares[pair])}
            for pair, cosine in conflicts.cosines.items()
        },
        "removed": _short(conflicts.removed),
        "task_weights": {task: _short(weight) for task, weight in zip(tasks, conflicts.weights, strict=True)},
        "exchanged_bytes": conflicts.sent_bytes,
    }


def of_layers(conflicts: Conflicts) -> dict[str, list[float]]:
    """Two tasks, joined by `+` -> the cosine of their gradients in each layer."""
    return {"+".join(pair): [_short(cosine) for cosine in cosines] for pair, cosines in conflicts.layers.items()}


def over_steps(
    tasks: Sequence[str],
    layers: Sequence[str],
    records: Iterable[Mapping[str, Any]],
    lines: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """How often and how much tasks stood in each other's way.

    records: of steps, with `figures`. lines: of the same steps, with `of_layers` as `cosines`.

    Returns steps: how many; layers: their names; removed: mean of the steps'; pairs: a list of {tasks: two names,
    cosine: mean of the steps', share: mean share of units in conflict, layers: {cosine: mean, often: share of the
    steps in which they opposed each other there, depth: mean cosine in these, 0 if there are none}, the items in the
    order of the layers}.
    """
    pairs = [(a, b) for place, a in enumerate(tasks) for b in tasks[place + 1 :]]
    keys = ["+".join(pair) for pair in pairs]
    records = [record for record in records if _is_whole(record.get("conflicts"), keys) and "removed" in record]
    lines = [line for line in lines if _is_whole(line.get("cosines"), keys)]

    def of_pair(pair: tuple[str, str]) -> dict[str, Any]:
        key = "+".join(pair)
        columns = list(zip(*(line["cosines"][key] for line in lines), strict=True))
        return {
            "tasks": list(pair),
            "cosine": _mean(record["conflicts"][key]["cosine"] for record in records),
            "share": _mean(record["conflicts"][key]["share"] for record in records),
            "layers": {
                "cosine": [_mean(column) for column in columns],
                "often": [_mean(cosine < 0 for cosine in column) for column in columns],
                "depth": [_mean([cosine for cosine in column if cosine < 0] or [0.0]) for column in columns],
            },
        }

    return {
        "steps": len(records),
        "layers": list(layers),
        "removed": _mean(record["removed"] for record in records),
        "pairs": [of_pair(pair) for pair in pairs],
    }


def _is_whole(tree: Any, keys: Sequence[str]) -> bool:
    """Whether what a file says of a step is of all pairs of tasks."""
    return isinstance(tree, Mapping) and set(keys) <= set(tree)


def _mean(values: Iterable[float]) -> float:
    """0 of none: of steps whose lines were lost."""
    return _short(fmean(list(values) or [0.0]))


def _short(value: float) -> float:
    return round(value, DIGITS)
