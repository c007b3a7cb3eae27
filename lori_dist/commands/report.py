"""`lori report`: measure interference between adapters; write a page, JSON and pictures."""

import argparse
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_dist import config
from lori_dist.commands._runs import finished_adapters, trainings_of
from lori_dist.errors import ConfigError
from lori_dist.files import read_regular

if TYPE_CHECKING:
    from lori_dist.adapter.adapter import Adapter

log = logging.getLogger(__name__)

SUMMARY = "measure interference between adapters; write a page, JSON and pictures"
HELP = """\
Compares adapters without running a model: cosines of their updates with the theoretical bound, overlap of supports,
sign conflicts, shared energy, norms; and with an evaluation, the drop of each task under each merge. Writes
report.json, report.html, which needs no network, and report-*.png. `lori run` does it at its end.

examples:
  lori report math.safetensors code.safetensors --out comparison
  lori report --run run.yaml --out comparison
  lori report runs/mine/train-*/adapter.safetensors --evaluation runs/mine/summary.json --out comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="*",
        help="adapter files or LoRA folders of PEFT; with --run, by default its tasks', and KEY=VALUE as for `run`",
    )
    parser.set_defaults(settings=[])
    matrix = parser.add_mutually_exclusive_group()
    matrix.add_argument("--run", metavar="CONFIG", help="the YAML file of a finished run: its adapters and evaluation")
    matrix.add_argument(
        "--evaluation", metavar="FILE", type=Path, help="summary.json of a run, or what `lori evaluate --out` wrote"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="folder to write; a report in it is replaced"
    )


def run(arguments: argparse.Namespace) -> None:
    words = [*arguments.adapters, *arguments.settings]
    settings = [word for word in words if re.match(r"[A-Za-z_][\w.-]*=", word)]
    adapters = [word for word in words if word not in settings]
    described = config.load(arguments.run, settings) if arguments.run is not None else None
    if described is None and settings:
        raise ConfigError(f"{settings[0]}: is an override, which needs a configuration; add --run CONFIG")
    made = finished_adapters(described) if described is not None else {}
    trainings = set(trainings_of(described)) if described is not None else set()
    named = {name: path for name, path in made.items() if name in trainings}
    paths = adapters or list(named.values())
    if not paths:
        raise ConfigError("ADAPTER: none is given; give adapter files, or with --run a run that has finished some")
    where = "--run" if described is not None else "--evaluation"
    matrix = described.folder / "summary.json" if described is not None else arguments.evaluation
    tree = {} if matrix is None else _tree(matrix, where)
    measured = None if matrix is None else _evaluation(tree.get("evaluation", tree), matrix, where)
    conflicts: Mapping[str, Any] = {}
    intervals: Any = None
    from lori_dist import formats
    from lori_dist.report import conflicts_of, write

    if described is not None:  # figures are those of the finished jobs, whose files are checked
        summary = _summary(described)
        measured, conflicts = summary["evaluation"], conflicts_of(summary)
        intervals = summary.get("intervals")
    elif matrix is not None:
        intervals = tree.get("intervals") if "evaluation" in tree else _intervals_beside(matrix)
    names = None if adapters else list(named)
    jobs = tree.get("jobs") if described is not None else None
    opened: dict[str, Adapter] = {}
    for number, path in enumerate(paths):
        name = str(number) if names is None else names[number]
        of_path = formats.by_task(Path(path))
        opened |= {name if task is None else f"{name}@{task}": one for task, one in of_path.items()}
    written = write(
        [*opened.values()],
        arguments.out,
        names=None if names is None else [*opened],
        evaluation=measured,
        intervals=intervals,
        jobs=jobs,
        conflicts=conflicts,
    )
    if measured and not written["drops"] and not conflicts:
        log.warning("%s: it has no model named after a task and no merge, so no drops can be computed", matrix)
    print(arguments.out / "report.html")


def _intervals_beside(matrix: Path) -> Any:
    """The intervals that `lori evaluate --out` wrote beside a matrix; None if there are none."""
    path = matrix.with_name(f"{matrix.stem}.intervals.json")
    return _tree(path, "--evaluation") if path.is_file() else None


def _tree(path: Path, where: str) -> dict[str, Any]:
    """The content of a run's summary, or of a file that `lori evaluate --out` wrote."""
    try:
        tree = json.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {str(path)!r} does not exist; `lori run` and `lori evaluate` write it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {str(path)!r} is not a JSON file ({error}); give the summary.json of a run"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {str(path)!r} does not hold a JSON object; give the summary.json of a run")
    return tree


def _evaluation(tree: Any, path: Path, where: str) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> task -> metric -> value."""
    try:
        return {
            str(model): {
                task: {metric: float(value) for metric, value in values.items()} for task, values in tasks.items()
            }
            for model, tasks in tree.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {str(path)!r} does not say model, task, metric and a number; give the summary.json of a run"
        ) from error


def _summary(described: config.Run) -> dict[str, Any]:
    """The summary that `lori run` would write of the finished jobs. Raises JobError for one whose files have
    changed."""
    from lori_dist.cluster.board import Board
    from lori_dist.cluster.run import planned

    return Board(run=described, jobs=planned(described), progress=lambda event: None).summary()
