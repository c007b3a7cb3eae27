"""Figures of an evaluation: on merges, on tasks that were trained one after another, and how sure a share is."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Evaluation = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> task -> metric -> value."""

Intervals = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Model -> task -> metric -> lowest and highest value, with a confidence of 95%."""

MEASURED, PREDICTIONS = "measured.jsonl", "predictions.jsonl"
"""Files of a model's evaluation: what it has measured so far, and each row's prediction."""

LOWER_IS_BETTER = frozenset({"loss"})
"""Metrics; more is better in all others, those of the user's own among them."""


Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5% above it."""


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The 95% interval of a share of so many rows, within 0 and 1 (Wilson 1927, without correction for continuity)."""
    spread = Z * Z / rows
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


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


def transfer(tasks: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
    """Metric -> what training the tasks one after another did to each, for metrics that all of them have.

    tasks: in the order of their trainings. evaluation: of `base` and of what there was after each task's training,
    under that task's name. Of each metric: lower_is_better; scores: model -> task -> score, of the base and after each
    task; and, with a[i][j] the score on task j after task i, its sign turned where lower is better, and a[0] the base,
    average: mean of a[T][j], as it was measured; forgetting: mean over j < T of the best a[i][j], j <= i < T, less
    a[T][j] (Chaudhry et al. 2018); backward: mean over j < T of a[T][j] - a[j][j]; forward: mean over j > 1 of
    a[j - 1][j] - a[0][j] (Lopez-Paz & Ranzato 2017, with the base instead of a random start).
    Empty until all have been evaluated.
    """
    models = ("base", *tasks)
    if len(tasks) < 2 or not all(task in evaluation.get(model, {}) for model in models for task in tasks):
        return {}
    metrics = dict.fromkeys(metric for task in tasks for metric in evaluation["base"][task])
    common = [
        metric for metric in metrics if all(metric in evaluation[model][task] for model in models for task in tasks)
    ]
    return {metric: _transfer(tasks, evaluation, metric) for metric in common}


def _transfer(tasks: Sequence[str], evaluation: Evaluation, metric: str) -> dict[str, Any]:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    a = [[sign * evaluation[model][task][metric] for task in tasks] for model in ("base", *tasks)]
    last = len(tasks)
    earlier = range(last - 1)  # column j is task j + 1, which row j + 1 was trained on
    return {
        "lower_is_better": sign < 0,
        "scores": {model: {task: evaluation[model][task][metric] for task in tasks} for model in ("base", *tasks)},
        "average": sign * fmean(a[last]),
        "forgetting": fmean(max(a[i][j] for i in range(j + 1, last)) - a[last][j] for j in earlier),
        "backward": fmean(a[last][j] - a[j + 1][j] for j in earlier),
        "forward": fmean(a[j][j] - a[0][j] for j in range(1, last)),
    }
