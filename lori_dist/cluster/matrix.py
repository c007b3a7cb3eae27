"""The evaluation of models in the processes that a launcher has started, or in one, with its figures in files."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lori_dist import atomic, evaluation
from lori_dist.cluster.run import with_absolute_paths
from lori_dist.config import Run
from lori_dist.evaluation import Store
from lori_dist.jobs import contents, evaluate_job, plan
from lori_dist.training.world import World

Matrix = dict[str, Any]
"""Model -> task -> metric -> value, or its interval."""


def evaluate_models(
    run: Run,
    adapters: Mapping[str, Path | None],
    world: World,
    *,
    out: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Matrix, Matrix]:
    """Every metric of a run on every task, of several models: the figures, and the intervals of accuracies.

    Every rank calls this. adapters: by name; None is the base. With evaluate.tasks `own`, those of the run are measured
    on their own tasks, and others, whose tasks are not known, on all. out: a file for the figures, beside which the
    intervals (`NAME.intervals.json`) and each row's prediction (`NAME.predictions.jsonl`) are written; what is measured
    is kept (`NAME.measured.jsonl`) until all is, so that the same call resumes. progress: as
    `evaluation.evaluate_all`, on rank 0. Raises what that does.
    """
    for path in adapters.values():
        if path is not None:
            evaluation.check_adapter(path, run.model)
    keeps = out is not None and (out.is_file() or not out.exists())  # not in a device or a pipe
    first = world.rank == 0
    stores = _stores(run, adapters, out) if first and keeps and out is not None else {}
    found = evaluation.evaluate_all(
        run, adapters, world=world, progress=progress if first else None, stores=stores, tasks=_own_tasks(run)
    )
    figures = {name: of_model.values for name, of_model in found.items()}
    intervals = {name: of_model.intervals for name, of_model in found.items()}
    if first and out is not None:
        _write(out, figures)
        if keeps:
            _write(_beside(out, "intervals.json"), intervals)
            _beside(out, "measured.jsonl").unlink(missing_ok=True)
    return figures, intervals


def _own_tasks(run: Run) -> dict[str, tuple[str, ...]]:
    if run.evaluate.tasks == "all":
        return {}
    return {job.settings["subject"]: tuple(job.settings["tasks"]) for job in plan(run) if job.kind == "evaluate"}


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}.{name}")


def _stores(run: Run, adapters: Mapping[str, Path | None], out: Path) -> dict[str, Store]:
    measured, predictions = _beside(out, "measured.jsonl"), _beside(out, "predictions.jsonl")
    if not measured.exists():
        predictions.unlink(missing_ok=True)  # of an evaluation that came to its end
    return {
        name: Store(
            measured=measured, predictions=predictions, label={"model": name}, origin=_origin(run, name, adapter)
        )
        for name, adapter in adapters.items()
    }


def _origin(run: Run, name: str, adapter: Path | None) -> str:
    """A digest of all that the figures follow from."""
    settings = evaluate_job(with_absolute_paths(run), "model", None).fingerprint
    files = {} if adapter is None else contents(adapter)
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    text = json.dumps(tree, indent=2) + "\n"
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
    else:
        atomic.write_text(path, text)
