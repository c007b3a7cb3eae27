"""The `lori` command: reads its arguments, runs a verb of commands/, and turns errors into messages and exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from lori_dist import commands
from lori_dist.commands._arguments import add_local_rank
from lori_dist.commands._endings import message_of
from lori_dist.errors import Redacting, print_anything, redacted


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 1 for a failure, 2 for a mistake in the configuration or the call, 3
    for a run that was stopped on request and has saved."""
    print_anything()
    chosen = _parse(sys.argv[1:] if arguments is None else arguments)
    world_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    _configure_logging(chosen.verbose, first=world_rank == "0")
    try:
        code = chosen.verb(chosen) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # as in `lori show FILE | head`; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        found = message_of(error, chosen.verbose)
        if found is None:
            raise
        message, code = found
        print(redacted(message if world_rank == "0" else f"rank {world_rank}: {message}"), file=sys.stderr)
    finally:
        if "torch" in sys.modules:
            from lori_dist.cluster import scratch

            scratch.remove_empty_cache()
    return int(code)


def _configure_logging(verbose: bool, *, first: bool) -> None:
    """Logs to stderr, from the first of the processes started together."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("lori_dist").setLevel(level if first else logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """KEY=VALUE may also come after options, and weights begin with a minus: argparse by itself expects neither."""
    parser = _parser()
    arguments = list(arguments)
    if "--weights" in arguments[:-1]:
        place = arguments.index("--weights")
        arguments[place : place + 2] = [f"--weights={arguments[place + 1]}"]
    chosen, more = parser.parse_known_args(arguments)
    unknown = [word for word in more if word.startswith("-") or not hasattr(chosen, "settings")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    chosen.settings = [*getattr(chosen, "settings", ()), *more]
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lori",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tunes a language model on several tasks with LoRI adapters, merges and evaluates them.",
        epilog="Start with: lori run configs/quickstart.yaml\n`lori VERB --help` describes a verb and gives examples.",
    )
    parser.add_argument("--version", action="version", version=f"lori_dist {_version()}")
    add_local_rank(parser)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name in commands.VERBS:
        verb = commands.load(name)
        description, _, rest = verb.HELP.partition("\n\n")
        below = verbs.add_parser(
            name,
            help=verb.SUMMARY,
            description=description,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        below.set_defaults(verb=verb.run)
        below.add_argument("--verbose", action="store_true", help="log more, and print tracebacks")
        verb.add_arguments(below)
    return parser


def _version() -> str:
    try:
        return metadata.version("lori_dist")
    except metadata.PackageNotFoundError:  # a job has the package from where it was submitted
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
