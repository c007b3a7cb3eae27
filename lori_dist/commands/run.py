"""`lori run`: train, merge and evaluate everything a configuration describes, under Ray."""

import argparse

from lori_dist import config, describe
from lori_dist.commands._arguments import OVERRIDES, add_config
from lori_dist.commands._endings import ended_by_sigterm

SUMMARY = "train, merge and evaluate everything a configuration describes, under Ray"
HELP = f"""\
Trains an adapter per task, merges them, and evaluates base, adapters and merges on every task. Jobs that do not depend
on each other run side by side. Run the same command again to resume: finished jobs are skipped.

With --address the run is submitted to a Ray cluster as a job. The configuration and this package are sent along;
methods of your own must be installed there. Paths must be absolute and visible from all nodes. This command follows
the job's log and exits with the job's exit code; Ctrl-C stops following the log, and the job continues.

examples:
  lori run configs/quickstart.yaml train.engine=fsdp cluster.workers=2
  lori run mine.yaml --address http://HOST:8265 cluster.workers=16 cluster.gpus_per_worker=1

exit code: 0; 1 if a job failed; 2 for a mistake in the configuration; 3 if the run was stopped by `lori stop`, SIGTERM
or train.time_limit, and can be resumed.

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--address", metavar="URL", help="address of the dashboard of a Ray cluster to run on")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="load the data, build every training job and evaluate one batch, but run no step and write nothing",
    )


@ended_by_sigterm
def run(arguments: argparse.Namespace) -> int | None:
    from lori_dist.cluster import scratch

    if arguments.address is not None:
        from lori_dist.cluster.submission import submit

        scratch.check()
        return submit(arguments.config, arguments.settings, arguments.address, dry_run=arguments.dry_run)
    described = config.load(arguments.config, arguments.settings)
    if arguments.dry_run:
        _show_dry_run(described)
        return None
    from lori_dist import progress
    from lori_dist.cluster.run import execute
    from lori_dist.cluster.summary import SUMMARY
    from lori_dist.evaluation._table import table

    with progress.of_run() as show_progress:
        summary = execute(described, progress=show_progress)
    made = {**summary["adapters"], **summary["merges"]}
    files = [(name, describe.size(item["kept"], item["total"]), item["path"]) for name, item in made.items()]
    figures = table(summary["evaluation"], summary["intervals"])
    print(figures, describe.table(("model", "size", "adapter"), files), sep="\n\n")
    before = [name for name, state in summary["jobs"].items() if state.get("cached")]
    if before:
        remedy = "Delete their folders, or give the run another name, to do them again."
        print(f"\nFinished before, and not done again: {', '.join(before)}.\n{remedy}")
    if summary["report"] is not None:
        print(f"\n{summary['report'].get('path') or 'No report: ' + summary['report']['error']}")
    print(f"\n{described.folder / SUMMARY}")
    return None


def _show_dry_run(described: config.Run) -> None:
    from lori_dist.cluster.dry_run import TITLES, dry_run

    lines, superseded = dry_run(described)
    print(describe.table(TITLES, lines))
    if superseded:
        print("", *superseded, sep="\n")
    ranks, place = described.cluster.workers, described.cluster.address
    built = f"Every training job was built by {ranks} rank{'' if ranks == 1 else 's'} (cluster.address: {place})"
    print(f"\n{built}, and no step was run. {described.folder} is unchanged.")
    if any(line[0].startswith("evaluate-") and line[1] != "finished" for line in lines):
        print(
            "The evaluation ran on the longest rows of each task, one batch a rank, with adapters of the planned size."
        )
    if described.cluster.packing != "off":
        print("Training jobs were built one at a time; jobs that share a base take more memory.")
