"""`lori train`: train one task's adapter, alone or under a launcher."""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lori_dist import config, plugin
from lori_dist.commands._arguments import OVERRIDES, add_config, add_local_rank
from lori_dist.commands._endings import message_of
from lori_dist.commands._runs import trainings_of
from lori_dist.errors import ConfigError

if TYPE_CHECKING:
    from lori_dist.training.world import World

SUMMARY = "train one task's adapter, alone or under a launcher"
HELP = f"""\
Trains the adapter of one task of a configuration in the processes that a launcher has started. The result is where
`lori run` expects it, so `lori run` does not train this task again.

examples:
  lori train run.yaml --task math
  torchrun --nproc-per-node 8 -m lori_dist train run.yaml --task math train.engine=fsdp
  deepspeed --num_gpus 8 --module lori_dist train run.yaml --task math train.engine=deepspeed train.engine.stage=3
  accelerate launch --multi_gpu --num_processes 8 -m lori_dist train run.yaml --task math
  srun --ntasks-per-node 8 lori train run.yaml --task math

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--task", required=True, metavar="NAME", help="name of a task of the configuration")
    add_local_rank(parser)


def run(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import scratch
    from lori_dist.cluster.failures import member

    scratch.check()
    with member(functools.partial(message_of, verbose=arguments.verbose)) as watch:
        path, is_first = _train(arguments, watch)
        if is_first:
            print(path)


def _train(arguments: argparse.Namespace, watch: "Callable[[World], None]") -> tuple[Path, bool]:
    """Returns the adapter's file, and whether this is rank 0."""
    described = config.load(arguments.config, arguments.settings)
    trainings = list(trainings_of(described))
    if arguments.task not in trainings:
        known, near = ", ".join(trainings), plugin.nearest(arguments.task, trainings)
        raise ConfigError(f"--task: unknown task {arguments.task!r}; there are {known}.{near}")
    import torch.distributed as dist

    from lori_dist import progress
    from lori_dist.cluster.launcher import train_task
    from lori_dist.training.accelerate_launch import followed
    from lori_dist.training.world import from_environment

    described = followed(described, os.environ, has_engine=config.has_engine(arguments.config, arguments.settings))
    world = from_environment()
    watch(world)
    with progress.of_training(arguments.task) as show_progress:
        path = train_task(described, arguments.task, world, progress=show_progress)
    dist.destroy_process_group()
    return path, world.rank == 0
