"""`lori status`: show the jobs of a run: progress, speed, retries, errors."""

import argparse
import json

from lori_dist import describe
from lori_dist.commands._arguments import OVERRIDES, add_run

SUMMARY = "show the jobs of a run: progress, speed, retries, errors"
HELP = f"""\
Reads only the run's files, so it works from any machine that sees them, during the run and after it. An ETA is that of
the whole training job; the first line has that of the run. Training jobs of `lori train` are shown too,
where no run was started in the folder.

examples:
  lori status runs/quickstart
  lori status mine.yaml output=/shared/runs --json

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import status

    found = status.status(status.folder_of(arguments.run, arguments.settings))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    who = f"{found['driver']} is working on it" if found["driver"] else "no process is working on it"
    if found["by_train"]:
        who = "training jobs that `lori train` has started; no `lori run` was started here"
    line = f"{found['folder']}: {who}{', and was asked to stop' if found['stopping'] else ''}"
    if found["eta_seconds"] is not None:
        line += f"; {'at least' if found['eta_is_least'] else 'about'} {status.duration(found['eta_seconds'])} left"
    print(describe.printable(line), describe.table(status.TITLES, status.rows(found)), sep="\n\n")
