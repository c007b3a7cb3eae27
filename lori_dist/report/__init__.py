"""The interference of adapters and the timeline of a run, as JSON, as an HTML page and as pictures.

`write` reports on adapters, `write_of_run` on a finished run. page.py makes the page, plots.py and timeline.py the
pictures; the figures themselves are computed in interference.py. matplotlib, which takes a second to
import, is in plots.py and timeline.py alone. The keys of report.json are public.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import folder, formats, predictions
from lori_dist.adapter.adapter import Adapter
from lori_dist.atomic import naming, write_text
from lori_dist.errors import AdapterError, JobError
from lori_dist.interference import interference
from lori_dist.scores import Evaluation, Intervals, drops

__all__ = ["write", "write_of_run"]

JSON, PAGE, PICTURES = "report.json", "report.html", "report-"
NOTHING: dict[str, Any] = {"adapters": [], "layers": [], "projections": [], "norms": {}, "modules": {}, "pairs": []}
"""The interference of no adapters."""

NUM_EXAMPLES, NUM_COMPARED = 2, 20
"""Rows of a task and two models that a report shows, and how many such pairs."""

MOST_BYTES = 2**26
"""Bytes of predictions that a report reads at most."""

log = logging.getLogger(__name__)


def write(
    adapters: Sequence[Adapter],
    out: Path,
    *,
    names: Sequence[str] | None = None,
    evaluation: Evaluation | None = None,
    intervals: Intervals | None = None,
    jobs: Mapping[str, Mapping[str, Any]] | None = None,
    conflicts: Mapping[str, Any] | None = None,
    transfer: Mapping[str, Any] | None = None,
    same_merges: Sequence[Sequence[str]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Writes report.json, report.html and report-NAME.png into a folder, in place of those of an earlier report.

    names: as of `interference`. evaluation: with it the report has the drop of each task under each merge. intervals:
    of its accuracies, shown beside them. jobs: of a summary.json; with them the page has their timeline, and adapters
    may be missing. conflicts: of adapters that tasks were trained together for, what the trainings' results say of
    them. transfer: between tasks that were trained one after another, as `scores.transfer` has it. same_merges: groups
    of merges that are the same function, by name. examples: rows that one model gets right and another wrong, as
    `predictions.compared` has them.
    Returns what report.json holds: the tree of `interference`, under `drops` that of `drops`, `conflicts`, `transfer`,
    `same_merges`, `examples`.
    """
    from lori_dist.report.page import page  # draws with matplotlib, which takes a second to import
    from lori_dist.report.plots import plots
    from lori_dist.report.timeline import rows, timeline

    of_jobs = rows(jobs or {})
    found = NOTHING if of_jobs and not adapters else interference(adapters, names=names)
    report = {**found, "drops": drops(evaluation or {})}
    if evaluation and intervals:
        report["intervals"] = dict(intervals)
    if conflicts:
        report["conflicts"] = dict(conflicts)
    if transfer:
        report["transfer"] = dict(transfer)
    if same_merges:
        report["same_merges"] = [list(names) for names in same_merges]
    if examples:
        report["examples"] = [dict(one) for one in examples]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"{out}: cannot be made: {error.strerror or error}; give a folder that can") from error
    for left in out.glob(f"{PICTURES}*.png"):
        left.unlink()
    drawn = list(plots(report))
    over_time = timeline(of_jobs) if of_jobs else None
    for plot in [*drawn, *([over_time] if over_time else [])]:
        with naming(out / f"{PICTURES}{plot.name}.png"):
            plot.save(out / f"{PICTURES}{plot.name}.png")
    write_text(out / PAGE, page(report, drawn, of_jobs, over_time))
    folder.write_json(out / JSON, report)
    return report


def write_of_run(summary: Mapping[str, Any], out: Path) -> dict[str, str] | None:
    """The report of a run's adapters and jobs beside its summary. A run does not fail by its report.

    Returns {"path": of the page}, or {"error": why there is none}, or None for a run with less than two adapters whose
    jobs have no times, if no tasks were trained together.
    """
    paths, jobs = {name: made["path"] for name, made in summary["adapters"].items()}, summary.get("jobs", {})
    conflicts = conflicts_of(summary)
    try:
        from lori_dist.report.timeline import rows

        if len(paths) < 2 and not rows(jobs) and not conflicts:
            return None
        adapters = dict[str, Adapter]()
        for name, path in paths.items():
            of_path = formats.by_task_or_whole(Path(path))
            adapters |= {
                name if task is None else f"{name}@{task}": one
                for task, one in of_path.items()
                if isinstance(one, Adapter)
            }
        write(
            _blocks([*adapters.values()][-1]) if "transfer" in summary and adapters else [*adapters.values()],
            out,
            names=list(adapters),
            evaluation=summary["evaluation"],
            intervals=summary.get("intervals"),
            jobs=jobs,
            conflicts=conflicts,
            transfer=summary.get("transfer"),
            same_merges=summary.get("same_merges", ()),
            examples=_examples(out),
        )
    except Exception as error:
        log.warning("%s: no report could be made: %s", out, error)
        log.debug("", exc_info=error)
        return {"error": f"{type(error).__name__}: {error}"}
    return {"path": str(out / PAGE)}


def _examples(folder: Path) -> list[dict[str, Any]]:
    """A few rows on which each task's own adapter and the merges differ; none without predictions, or with so many that
    to read them would take long."""
    if sum(path.stat().st_size for path in predictions.files(folder)) > MOST_BYTES:
        return []
    try:
        found = predictions.compared(predictions.read(folder), number=NUM_EXAMPLES)
    except JobError as error:
        log.debug("%s", error)
        return []
    return [one for one in found if one["examples"]][:NUM_COMPARED]


def _blocks(adapter: Adapter) -> list[Adapter]:
    """The parts of an adapter that has grown from task to task: what each task added."""
    return [dataclasses.replace(adapter, blocks=(block,)) for block in adapter.blocks]


def conflicts_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Adapter -> the conflicts of the tasks that were trained together for it."""
    return {name: made["conflicts"] for name, made in summary["adapters"].items() if "conflicts" in made}
