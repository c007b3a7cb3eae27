"""`lori bench`: run a benchmark."""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lori_dist import describe, plugin
from lori_dist.commands._arguments import check_writable, options, write_json

SUMMARY = "run a benchmark"
HELP = """\
Runs a benchmark on this machine and prints its figures and ratios. The JSON file has `rows`, `ratios`, `suite` and
`machine`.

example:
  lori bench projection --out projection.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE", help=f"one of {', '.join(plugin.names('benchmarks'))}")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="options of the suite")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures there, as JSON")


def run(arguments: argparse.Namespace) -> None:
    suite = plugin.find("benchmarks", arguments.suite, "run", "SUITE")
    chosen = suite.bind(options(arguments.settings), "SUITE")
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    from lori_dist.benchmarks import provenance

    begun = provenance(shlex.join(["lori", "bench", arguments.suite, *arguments.settings]))
    measured = suite.load()(**chosen)
    ratios = [(name, str(ratio)) for name, ratio in _flat(measured["ratios"])]
    print(describe.records(measured["rows"]), describe.table(("ratio", ""), ratios), sep="\n\n")
    if arguments.out is not None:
        write_json(arguments.out, {"suite": arguments.suite, "options": chosen, **begun, **measured})


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings, with their keys joined."""
    for key, item in tree.items():
        if isinstance(item, Mapping):
            yield from ((f"{key}, {name}", leaf) for name, leaf in _flat(item))
        else:
            yield key, item
