"""What starting a training on a Ray cluster costs, beside a bare TorchTrainer, and what a job costs beside its work.

`python -m tests.benchmarks.orchestration --out orchestration.json` measures it.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from lori_dist import config, folder
from lori_dist.__main__ import main
from lori_dist.cluster.connection import connected
from lori_dist.cluster.gang import Gangs
from lori_dist.cluster.run import execute, with_absolute_paths
from lori_dist.cluster.summary import METRICS
from lori_dist.cluster.work import Assignment, train_rank
from lori_dist.config import Run
from lori_dist.jobs import Job, train_job


def run(
    *,
    configuration: str = "configs/quickstart.yaml",
    workers: Annotated[int, "[1, inf)"] = 2,
    jobs: Annotated[int, "[1, inf)"] = 8,
    repetitions: Annotated[int, "[1, inf)"] = 3,
) -> dict[str, Any]:
    """Rows and ratios of a local cluster's gangs of `workers` ranks.

    `start`: seconds from asking for a training, of the first task of `configuration` on its model, to the end of its
    first step: in a new gang, in a gang that has trained before, and by a TorchTrainer that calls the same function.
    They take turns; figures are medians. `job`: seconds of a training with one step in a run of `jobs` tasks one after
    another, from its start by the driver to its published result; its overhead is what rank 0 did not spend in `train`.
    ratios: `new_minus_torch_trainer` and `waiting_minus_torch_trainer` in seconds, `overhead_seconds` of a job.
    """
    chosen = _short(config.load(configuration), workers)
    ways: dict[str, Callable[[Gangs, Run, Job], None]] = {
        "new": _in_a_new_gang,
        "waiting": _in_a_gang_that_waits,
        "torch_trainer": _by_torch_trainer,
    }
    with tempfile.TemporaryDirectory() as name, connected(chosen) as nodes:
        gangs = Gangs(environment={}, nodes=nodes)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(repetitions):
            for way, start in ways.items():
                seconds[way].append(_until_first_step(start, gangs, chosen, Path(name) / f"{way}-{number}"))
        gangs.keep(0)
    starts = {way: statistics.median(found) for way, found in seconds.items()}
    job_seconds, overhead = _jobs(chosen, jobs)
    return {
        "rows": [
            *({"what": "start", "how": way, "seconds": seconds} for way, seconds in starts.items()),
            {"what": "job", "how": f"{jobs} tasks, one after another", "seconds": job_seconds},
        ],
        "ratios": {
            "new_minus_torch_trainer": starts["new"] - starts["torch_trainer"],
            "waiting_minus_torch_trainer": starts["waiting"] - starts["torch_trainer"],
            "overhead_seconds": overhead,
        },
    }


def _short(run: Run, workers: int) -> Run:
    """One step of each task, on a cluster of this machine."""
    once: dict[str, Any] = {"steps": 1, "epochs": None, "warmup_steps": 0, "checkpoint_every": None}
    train = dataclasses.replace(run.train, **once, calibrate=config.Calibrate())
    return dataclasses.replace(
        with_absolute_paths(run),
        train=train,
        merges={},
        cluster=config.Cluster(workers=workers, cpus_per_worker=1 / workers),
    )


def _until_first_step(start: Callable[[Gangs, Run, Job], None], gangs: Gangs, run: Run, place: Path) -> float:
    run = dataclasses.replace(run, output=str(place))
    job = train_job(run, next(iter(run.tasks)))
    asked = time.time()
    start(gangs, run, job)
    with (run.folder / f"{folder.PARTIAL}{job.name}" / METRICS).open(encoding="utf-8") as lines:
        first: float = json.loads(next(lines))["time"]
    return first - asked


def _assignment(run: Run, job: Job) -> Assignment:
    return Assignment(tree=config.dump(run), job=job, attempt=folder.attempt(folder.open(run.folder, job)))


def _in_a_new_gang(gangs: Gangs, run: Run, job: Job) -> None:
    gangs.keep(0)
    _in_a_gang_that_waits(gangs, run, job)


def _in_a_gang_that_waits(gangs: Gangs, run: Run, job: Job) -> None:
    gang = gangs.take(job, run.cluster)
    gang.run(train_rank, _assignment(run, job), gangs.stopping)
    gangs.give_back(gang)


def _by_torch_trainer(gangs: Gangs, run: Run, job: Job) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gangs.keep(0)
    cluster = run.cluster
    part = {"CPU": cluster.cpus_per_worker}
    TorchTrainer(
        _train,
        train_loop_config={"assignment": _assignment(run, job)},
        scaling_config=ScalingConfig(num_workers=cluster.workers, resources_per_worker=part),
        run_config=RunConfig(storage_path=str(run.folder / "ray")),
    ).fit()


def _train(settings: dict[str, Any]) -> None:
    train_rank(settings["assignment"])


def _jobs(run: Run, count: int) -> tuple[float, float]:
    """Median seconds of a training in a run of many, and of what of them is not training."""
    task = next(iter(run.tasks.values()))
    tasks = {f"task{number}": task for number in range(count)}
    with tempfile.TemporaryDirectory() as place:
        many = dataclasses.replace(run, tasks=tasks, output=place, evaluate=dataclasses.replace(run.evaluate, rows=1))
        summary = execute(dataclasses.replace(many, cluster=dataclasses.replace(run.cluster, max_concurrent=1)))
    seconds = [summary["jobs"][f"train-{name}"]["seconds"] for name in tasks]
    trained = [summary["adapters"][name]["seconds"] for name in tasks]
    return statistics.median(seconds), statistics.median(a - b for a, b in zip(seconds, trained, strict=True))


if __name__ == "__main__":
    sys.exit(main(["bench", "tests.benchmarks.orchestration", *sys.argv[1:]]))
