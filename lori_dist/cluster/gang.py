"""A job's processes on the cluster: a gang for a training, one for anything else."""

import shutil

from lori_dist.cluster import schedule, trials
from lori_dist.cluster.connection import runtime_env
from lori_dist.cluster.work import Assignment, evaluate_model, merge_adapters, train_rank
from lori_dist.config import Run

RAY = ".ray"


def run_training(run: Run, assignment: Assignment) -> None:
    """Runs a training on all its ranks and waits for its end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _, part = schedule.processes(assignment.job, run.cluster)
    storage = run.folder / RAY
    # A name of its own: one that was used before would bring back what Ray remembers of then.
    name = f"{assignment.job.name}-{assignment.attempt.token}"
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=run.cluster.workers,
            use_gpu=part.gpus > 0,
            resources_per_worker={"CPU": part.cpus} | ({"GPU": part.gpus} if part.gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # Ray would retry mistakes as well as lost nodes: whether to retry is decided here.
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env=runtime_env(run),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)


def run_task(run: Run, assignment: Assignment) -> None:
    """Runs a merge or an evaluation and waits for its end."""
    import ray

    if "search" in assignment.job.settings:
        assignment = trials.searched(run, assignment)
    function = {"merge": merge_adapters, "evaluate": evaluate_model}[assignment.job.kind]
    ray.get(trials.remote(run, assignment.job, function).remote(assignment))
