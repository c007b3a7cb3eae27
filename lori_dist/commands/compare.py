"""`lori compare`: run a configuration in several variants, with several seeds."""

import argparse
import logging
from typing import Any

from lori_dist import config, describe
from lori_dist.commands._arguments import OVERRIDES, add_config
from lori_dist.commands._endings import ended_by_sigterm

log = logging.getLogger(__name__)

SUMMARY = "run a configuration in several variants, with several seeds"
HELP = f"""\
Runs all variants of a comparison, one after another, and prints mean and standard deviation over the seeds, and the 95%
interval of shares. A variant with a grid first tries each list of settings on validation rows. Finished runs are
skipped, and one that was interrupted resumes, so the same command ends what days have begun. configs/comparison.yaml is
an example; overrides apply to all runs.

examples:
  lori compare configs/comparison.yaml train.steps=60
  lori compare configs/comparison.yaml --dry-run

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check and list all runs, and what is finished of them")


@ended_by_sigterm
def run(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import comparison

    described = comparison.load(arguments.config)
    if arguments.dry_run:
        print(describe.table(("run", "state"), list(comparison.states(described, arguments.settings))))
        return
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
