"""`lori show`: show what is in an adapter, rows on which a run's models differ, or list the methods."""

import argparse
import json
from pathlib import Path
from typing import Any

from lori_dist import describe
from lori_dist.errors import ConfigError
from lori_dist.scores import PREDICTIONS

SUMMARY = "show what is in an adapter, rows on which a run's models differ, or list the methods"
HELP = """\
With an adapter file, or a LoRA folder of PEFT: prints its header, its components, and the density of B by layer and
module kind. With a run, its folder or its YAML file, or a file NAME.predictions.jsonl of `lori evaluate`: prints test
rows that one model gets right and another wrong, by default each task's own adapter and the merges. Without an
argument, or with the word `methods`: lists every mask, merge, engine, plan, metric and benchmark.

examples:
  lori show runs/quickstart/train-arithmetic/adapter.safetensors
  lori show runs/quickstart
  lori show runs/quickstart --task refusal --right refusal --wrong average --rows 10
  lori show matrix.predictions.jsonl --wrong base --metric choice --json
  lori show methods
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="ADAPTER|RUN",
        nargs="?",
        default="methods",
        help="adapter file or folder, a run's folder or YAML file, or `methods`",
    )
    of_run = parser.add_argument_group("rows of a run")
    of_run.add_argument("--task", metavar="NAME", action="append", help="task; can be repeated (default: all)")
    of_run.add_argument("--right", metavar="MODEL", help="model that gets the rows right")
    of_run.add_argument("--wrong", metavar="MODEL", help="model that gets them wrong")
    of_run.add_argument("--metric", metavar="NAME", help="metric (default: the first that is a share of rows)")
    of_run.add_argument("--rows", metavar="N", type=_count, help="rows of each pair of models (default: 3)")
    of_run.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> None:
    from lori_dist import predictions

    path, options = Path(arguments.what), ("task", "right", "wrong", "metric", "rows")
    place: Path | None = None
    if path.suffix in (".yaml", ".yml") and path.is_file():
        from lori_dist import config

        place = config.load(arguments.what, [], elsewhere=True).folder
    elif path.name.endswith(PREDICTIONS) or (path.is_dir() and predictions.is_of_run(path)):
        place = path
    if place is not None:
        found = predictions.compared(
            predictions.read(place),
            tasks=arguments.task or (),
            metric=arguments.metric,
            right=arguments.right,
            wrong=arguments.wrong,
            number=3 if arguments.rows is None else arguments.rows,
        )
        print(json.dumps({"comparisons": found}, indent=2) if arguments.json else describe.comparisons(found))
        return
    given = next((f"--{name}" for name in options if getattr(arguments, name) is not None), None)
    given = given or ("--json" if arguments.json else None)
    if given is not None:
        raise ConfigError(f"{given}: is for the rows of a run, and {arguments.what!r} is not one; remove it")
    print(describe.methods() if arguments.what == "methods" else describe.adapter_file(path))


def _count(text: str) -> Any:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number")
    return int(text)
