"""The verbs of `lori`, one file each, in the order in which `lori --help` lists them.

A file has SUMMARY (its line in `lori --help`), HELP (what `lori VERB --help` says), `add_arguments(parser)` and
`run(arguments)`, which gives the exit code where that is not 0. To add a verb, add its file, and its name to VERBS.
Files whose names begin with an underscore hold what several verbs share. Whatever is heavy (torch, ray, transformers)
is imported inside `run`, so that help and a mistake in a configuration answer at once.
"""

import argparse
import importlib
from typing import Protocol, cast

VERBS = (
    "run",
    "compare",
    "plan",
    "data",
    "status",
    "stop",
    "train",
    "merge",
    "evaluate",
    "generate",
    "export",
    "report",
    "show",
    "schema",
    "cache",
    "bench",
)


class Verb(Protocol):
    """The members of a file in this folder."""

    SUMMARY: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int | None: ...


def load(name: str) -> Verb:
    """Returns the verb of that name."""
    return cast(Verb, importlib.import_module(f"lori_dist.commands.{name}"))
