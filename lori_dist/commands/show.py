"""`lori show`: show what is in an adapter, or list the methods."""

import argparse
from pathlib import Path

from lori_dist import describe

SUMMARY = "show what is in an adapter, or list the methods"
HELP = """\
With an adapter file, or a LoRA folder of PEFT: prints its header, its components, and the density of B by layer and
module kind. Without one, or with the word `methods`: lists every mask, merge, engine, plan, metric and benchmark.

examples:
  lori show runs/quickstart/train-arithmetic/adapter.safetensors
  lori show methods
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="ADAPTER", nargs="?", default="methods", help="adapter file or folder, or `methods`"
    )


def run(arguments: argparse.Namespace) -> None:
    print(describe.methods() if arguments.what == "methods" else describe.adapter_file(Path(arguments.what)))
