"""Each task by itself (LoRI, arXiv 2504.07448)."""

from lori_dist.config import Run
from lori_dist.jobs import Job, evaluate_job, merge_job, train_job


def plan(run: Run) -> list[Job]:
    """One training per task, the merges of their adapters, and the evaluation of base, adapters and merges."""
    trained = {task: train_job(run, task) for task in run.tasks}
    merged = {name: merge_job(run, name, trained) for name in run.merges}
    evaluated = [evaluate_job(run, model, adapter) for model, adapter in {"base": None, **trained, **merged}.items()]
    return [*trained.values(), *merged.values(), *evaluated]
