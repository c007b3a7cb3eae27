"""Metrics for the eyes: TensorBoard, W&B, MLflow and whatever else accelerate knows, by name."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lori_dist import folder
from lori_dist.config import Run
from lori_dist.errors import JobError, redacted

if TYPE_CHECKING:  # a run without trackers does without accelerate
    from accelerate.tracking import GeneralTracker

TENSORBOARD = "tensorboard"
"""The folder, in the run's, that `tensorboard --logdir` reads; each job has one in it."""

ARGUMENTS: Mapping[str, Callable[[Run, str, int], dict[str, Any]]] = {
    "aim": lambda run, curve, _: {"run_name": curve, "logging_dir": run.folder, "experiment": run.name},
    "clearml": lambda run, curve, _: {"run_name": run.name, "task_name": curve},
    "comet_ml": lambda run, curve, _: {"run_name": run.name},  # it names what it draws itself
    "dvclive": lambda run, curve, _: {"dir": str(run.folder / "dvclive" / curve)},
    "mlflow": lambda run, curve, _: {"experiment_name": run.name, "run_name": curve},
    "swanlab": lambda run, curve, _: {"run_name": run.name, "experiment_name": curve},
    "tensorboard": lambda run, curve, step: {
        "run_name": curve,
        "logging_dir": run.folder / TENSORBOARD,
        "purge_step": step,
    },
    "trackio": lambda run, curve, _: {"run_name": run.name, "name": curve},
    "wandb": lambda run, curve, _: {"run_name": run.name, "name": curve, "dir": str(run.folder)},
}
"""How each gets the name of the run, that of what it draws (a job, or a phase of one), and the step it begins at."""

NOT_DRAWN = ("step", "num_steps", "steps_left", "time")


@contextlib.contextmanager
def tracked(run: Run, job: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what hands a job's records to the trackers of its run.

    job: its name. A record's `phase` has a curve of its own, whose steps are those of the phase. Nothing is begun
    before the first record. Where a phase resumes after a kill, TensorBoard drops what it had from there on; the others
    get a new run of the same name. A `metric` is drawn by its name and that of its task, of all else the numbers are.
    Raises JobError for a tracker that cannot begin, and RuntimeError for one that fails later, as a connection may
    come back; neither has the values of secrets in the environment.
    """
    begun: dict[str, list[GeneralTracker]] = {}

    def track(record: Mapping[str, Any]) -> None:
        curve = f"{job}/{record['phase']}" if "phase" in record else job
        step = record.get("step", 0)
        if curve not in begun:
            finish()
            begun[curve] = []
            for name in run.trackers:
                with _explained(name, JobError):
                    begun[curve].append(_begin(name, run, curve, step))
        for tracker in begun[curve]:
            with _explained(tracker.name, RuntimeError):
                tracker.log(_drawn(record), step=step)

    def finish() -> None:
        for tracker in begun.popitem()[1] if begun else ():
            with _explained(tracker.name, RuntimeError):
                tracker.finish()

    try:
        yield track
    except BaseException:
        with contextlib.suppress(RuntimeError):  # which would hide what went wrong before
            finish()
        raise
    finish()


def forget(run: Run, job: str) -> None:
    """Takes away what TensorBoard has of an earlier job of this name, which is about to be done again: the curves of a
    finished one get the name under which its folder will be kept."""
    curves = run.folder / TENSORBOARD / job
    kept = curves.with_name(folder.next_kept(run.folder / job).name)
    if folder.is_finished(run.folder / job) and curves.is_dir() and not kept.exists():
        curves.rename(kept)
    else:
        shutil.rmtree(curves, ignore_errors=True)


def _begin(name: str, run: Run, curve: str, step: int) -> "GeneralTracker":
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    _be_one_process()
    tracker = LOGGER_TYPE_TO_CLASS[name](**ARGUMENTS[name](run, curve, step))
    tracker.start()
    return tracker


def _be_one_process() -> None:
    """Accelerate's state, which its log lines need, as that of one process. No other has trackers, and what it would
    make of a launcher's variables (a process group, a device, threads) is settled already."""
    from accelerate.state import PartialState

    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        PartialState()
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank


def _drawn(record: Mapping[str, Any]) -> dict[str, float]:
    if "metric" in record:
        return {f"{record['metric']}/{record['task']}": record["value"]}
    return {key: value for key, value in record.items() if isinstance(value, int | float) and key not in NOT_DRAWN}


@contextlib.contextmanager
def _explained(name: str, kind: type[RuntimeError]) -> Iterator[None]:
    """A tracker's error with its place and without secrets. Its cause is left out, as that would be printed in full."""
    try:
        yield
    except Exception as error:
        found = redacted(f"{type(error).__name__}: {error}")
        raise kind(f"trackers: {name} does not work ({found}); set it up, or remove it from trackers") from None
