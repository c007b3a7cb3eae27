"""`lori stop`: stop a run so that the same command resumes it."""

import argparse

from lori_dist.commands._arguments import OVERRIDES, add_run

SUMMARY = "stop a run so that the same command resumes it"
HELP = f"""\
Requests a stop through the run's folder and waits until the run has stopped. Training jobs finish their step and save
a checkpoint first; the stopped command exits with code 3.

example:
  lori stop runs/quickstart

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="longest time to wait (default: 120)"
    )


def run(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import status

    root = status.folder_of(arguments.run, arguments.settings)
    driver = status.stop(root, timeout=arguments.timeout)
    print(
        f"{root}: "
        + ("no process is working on it" if driver is None else f"{driver} has ended; `lori run` resumes from here")
    )
