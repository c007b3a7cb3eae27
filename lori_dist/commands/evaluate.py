"""`lori evaluate`: evaluate base and adapters on every task of a configuration."""

import argparse
from pathlib import Path

from lori_dist import config
from lori_dist.commands._arguments import OVERRIDES, add_config, check_writable, write_json
from lori_dist.commands._runs import finished_adapters

SUMMARY = "evaluate base and adapters on every task of a configuration"
HELP = f"""\
Prints one table per metric, with a row per model and a column per task. Without --adapter it evaluates the base and
every adapter and merge that a run of this configuration has finished.

example:
  lori evaluate run.yaml --adapter merged.safetensors --out matrix.json evaluate.rows=100

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--adapter", metavar="PATH", type=Path, action="append", help="adapter file or folder; can be repeated"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")


def run(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    adapters = {str(path): path for path in arguments.adapter or ()} or finished_adapters(described)
    models = {"base": None, **adapters}
    from lori_dist.cluster import scratch

    scratch.check()
    import torch

    from lori_dist import evaluation, progress
    from lori_dist.evaluation._table import table
    from lori_dist.training.device import first

    device = first(torch.cuda.device_count())
    for path in adapters.values():
        evaluation.check_adapter(path, described.model)
    matrix: dict[str, dict[str, dict[str, float]]] = {}
    with progress.of_evaluation(tuple(models)) as show_progress:
        matrix.update(evaluation.evaluate_all(described, models, device=device, progress=show_progress))
    print(table(matrix))
    if arguments.out is not None:
        write_json(arguments.out, matrix)
