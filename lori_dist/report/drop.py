"""What each merge costs each task, from the evaluation of a run."""

from collections.abc import Mapping
from typing import Any

Evaluation = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> task -> metric -> value."""

LOWER_IS_BETTER = frozenset({"loss"})
"""Metrics; more is better in all others, those of the user's own among them."""


def drops(evaluation: Evaluation) -> dict[str, Any]:
    """Metric -> {lower_is_better, single, merges}: what a merge loses of what each task's own adapter reaches.

    single: task -> score of the adapter of its name. merges: model -> {score, drop: task -> value, kept}, for each
    model that is neither `base` nor the adapter of a task. drop = single - merged, or merged - single where lower is
    better: above zero, the merge is worse. kept: the mean of merged / single over the tasks whose single score is
    above zero, null where there is none, and where lower is better.
    """
    metrics = dict.fromkeys(metric for tasks in evaluation.values() for values in tasks.values() for metric in values)
    found = {metric: _drops(evaluation, metric) for metric in metrics}
    return {metric: figures for metric, figures in found.items() if figures["merges"]}


def _drops(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    adapters = [name for name, tasks in evaluation.items() if name in tasks]
    single = {task: evaluation[task][task][metric] for task in adapters if metric in evaluation[task][task]}
    merges = {}
    for model, tasks in evaluation.items():
        score = {task: tasks[task][metric] for task in single if metric in tasks.get(task, {})}
        if model != "base" and model not in adapters and score:
            merges[model] = _of_merge(single, score, metric in LOWER_IS_BETTER)
    return {"lower_is_better": metric in LOWER_IS_BETTER, "single": single, "merges": merges}


def _of_merge(single: Mapping[str, float], score: Mapping[str, float], lower_is_better: bool) -> dict[str, Any]:
    sign = -1 if lower_is_better else 1
    shares = [] if lower_is_better else [value / single[task] for task, value in score.items() if single[task] > 0]
    return {
        "score": score,
        "drop": {task: sign * (single[task] - value) for task, value in score.items()},
        "kept": sum(shares) / len(shares) if shares else None,
    }
