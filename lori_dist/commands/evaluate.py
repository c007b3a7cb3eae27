"""`lori evaluate`: evaluate base and adapters on every task of a configuration."""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lori_dist import config
from lori_dist.commands._arguments import OVERRIDES, add_config, add_local_rank, check_writable
from lori_dist.commands._endings import message_of
from lori_dist.commands._runs import finished_adapters

if TYPE_CHECKING:
    from lori_dist.training.world import World

SUMMARY = "evaluate base and adapters on every task of a configuration"
HELP = f"""\
Prints one table per metric, with a row per model and a column per task. Without --adapter it evaluates the base and
every adapter and merge that a run of this configuration has finished. Under a launcher, the ranks hold the base as
evaluate.engine says (default: train.engine) and divide the rows. With --out, the intervals of accuracies and each row's
prediction are written beside the figures, and the same command resumes an evaluation that was cut off.

examples:
  lori evaluate run.yaml --adapter merged.safetensors --out matrix.json evaluate.rows=100
  torchrun --nproc-per-node 8 -m lori_dist evaluate run.yaml evaluate.engine=fsdp
  deepspeed --num_gpus 8 --module lori_dist evaluate run.yaml evaluate.engine=deepspeed evaluate.engine.stage=3
  accelerate launch --multi_gpu --num_processes 8 -m lori_dist evaluate run.yaml
  srun --ntasks-per-node 8 lori evaluate run.yaml

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--adapter", metavar="PATH", type=Path, action="append", help="adapter file or folder; can be repeated"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    add_local_rank(parser)


def run(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    adapters = {str(path): path for path in arguments.adapter or ()} or finished_adapters(described)
    from lori_dist.cluster import scratch
    from lori_dist.cluster.failures import member

    scratch.check()
    with member(functools.partial(message_of, verbose=arguments.verbose)) as watch:
        text = _evaluated(described, adapters, arguments, watch)
        if text is not None:
            print(text)


def _evaluated(
    described: config.Run, adapters: dict[str, Path], arguments: argparse.Namespace, watch: "Callable[[World], None]"
) -> str | None:
    """The tables, on rank 0."""
    import torch.distributed as dist

    from lori_dist import progress
    from lori_dist.cluster.matrix import evaluate_models
    from lori_dist.evaluation._table import table
    from lori_dist.training.accelerate_launch import followed
    from lori_dist.training.world import from_environment

    described = followed(described, os.environ, has_engine=config.has_engine(arguments.config, arguments.settings))
    world = from_environment()
    watch(world)
    models = {"base": None, **adapters}
    with progress.of_evaluation() as show_progress:
        matrix, intervals = evaluate_models(described, models, world, out=arguments.out, progress=show_progress)
    dist.destroy_process_group()
    return table(matrix, intervals) if world.rank == 0 else None
