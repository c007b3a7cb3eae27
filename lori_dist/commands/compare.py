"""`lori compare`: run a configuration in several variants, with several seeds."""

import argparse
import logging
from typing import Any

from lori_dist import config
from lori_dist.commands._arguments import OVERRIDES, add_config
from lori_dist.commands._endings import ended_by_sigterm

log = logging.getLogger(__name__)

SUMMARY = "run a configuration in several variants, with several seeds"
HELP = f"""\
Runs all variants of a comparison, one after another, and prints mean and standard deviation over the seeds. Finished
runs are skipped. configs/comparison.yaml is an example; overrides apply to all runs.

example:
  lori compare configs/comparison.yaml train.steps=60

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


@ended_by_sigterm
def run(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import comparison

    described = comparison.load(arguments.config)
    comparison.runs(described, arguments.settings)  # its mistakes come before anything heavy is loaded
    from lori_dist import progress
    from lori_dist.cluster.run import execute
    from lori_dist.evaluation._table import compared

    def do(run: config.Run) -> dict[str, Any]:
        log.info("%s", run.name)
        with progress.of_run() as show_progress:
            return execute(run, progress=show_progress)

    result = comparison.compare(described, arguments.settings, execute=do)
    print(compared(result), result["path"], sep="\n\n")
