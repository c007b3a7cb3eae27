"""A model card in the hub's form: front matter that programs read, and what is known of the adapter for people."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter, Block
from lori_dist.atomic import write_text
from lori_dist.files import parse_json, read_regular
from lori_dist.jobs import sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The run's record of how an adapter file was made. It is empty if the file does not lie in a run."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the job that made the file: `data` and `train`, or the method of a merge."""
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task -> metric -> value on its test rows."""


UNKNOWN = Origin()


def origin(adapter: Path) -> Origin:
    """Reads what the run left beside an adapter file. Only of jobs whose records have the hash of this very file."""
    record = _record(adapter.parent)
    if adapter.is_dir() or adapter.name not in record.get("sha256", {}):
        return UNKNOWN
    digest = sha256(adapter)
    if record["sha256"][adapter.name] != digest:
        return UNKNOWN
    evaluations = (_record(folder) for folder in sorted(adapter.parent.parent.glob("evaluate-*")))
    of_this = next((of for of in evaluations if digest in of.get("inputs", {}).values()), None)
    if of_this is None:
        return Origin(settings=record["settings"])
    # A merge's own record does not know the base model.
    settings = {"model": of_this.get("settings", {}).get("model"), **record["settings"]}
    return Origin(settings=settings, measured=of_this["result"]["evaluation"])


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    try:
        record = parse_json(read_regular(path))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def text(adapter: Adapter, base_model_name: str, origin: Origin, *, library: str = "peft") -> str:
    """A README.md: base model, tasks, how each block's A and B were made, and what the run says of its data.

    library: that which loads what the card lies beside.
    """
    metrics = sorted({metric for figures in origin.measured.values() for metric in figures})
    front = [
        "---",
        f"base_model: {json.dumps(base_model_name)}",  # a JSON string is one of YAML, whatever is in it
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [lora, lori]",
        *([f"metrics: {json.dumps(metrics)}"] if metrics else []),
        "---",
    ]
    total = max(adapter.total, 1)
    lines = [
        "",
        f"# {' + '.join(block.name for block in adapter.blocks)}",
        "",
        f"A LoRI adapter for `{base_model_name}`: {adapter.kept:,} of {total:,} entries of B are kept "
        f"({adapter.kept / total:.1%}), over {len(adapter.shapes)} linear layers. A is random and frozen where it has "
        "a seed.",
        "",
        "| task | rank | alpha | weight | A | kept entries |",
        "|---|---|---|---|---|---|",
        *(_row(block) for block in adapter.blocks),
        *_own_code(origin.settings),
        *_training(origin.settings),
        *_measures(origin.measured, metrics),
        "",
    ]
    return "\n".join([*front, *lines])


def write_of_run(summary: Mapping[str, Any], base_model_name: str) -> None:
    """Writes a model card beside the adapter of every finished training and merge of a run.

    summary: what is in summary.json.
    """
    for made in {**summary["adapters"], **summary["merges"]}.values():
        write_beside(Path(made["path"]), base_model_name)


def write_beside(path: Path, base_model_name: str) -> None:
    """Writes README.md beside an adapter file. A card that cannot be written is a warning, and no work is lost.

    base_model_name: for an adapter that does not name its base.
    """
    try:
        if None in (whole := formats.by_task_or_whole(path)) and not isinstance(whole[None], Adapter):
            return  # the card lists factors, which it does not have
        first, *others = formats.by_task(path).values()
        # Of several tasks' updates in a file, each is listed as a block.
        adapter = replace(first, blocks=(*first.blocks, *(block for other in others for block in other.blocks)))
        base = str(adapter.base.get("name", base_model_name))
        write_text(path.with_name("README.md"), text(adapter, base, origin(path), library="lori_dist"))
    except Exception as error:
        log.warning("%s: no model card could be written: %s", path, error)


def _row(block: Block) -> str:
    made = "stored" if block.seed is None else f"seed {block.seed}"
    kept = sum(entries.kept for entries in block.entries.values())
    name = block.name.replace("|", "\\|")
    return f"| {name} | {block.rank} | {block.alpha:g} | {block.weight:g} | {made} | {kept:,} |"


def _own_code(settings: Mapping[str, Any]) -> list[str]:
    model = settings.get("model")
    if not isinstance(model, Mapping) or not model.get("trust_remote_code"):
        return []
    return [
        "",
        "The base model has Python code of its own, which was run (`model.trust_remote_code: true`); whoever loads the "
        "base runs that code too, with `trust_remote_code=True`.",
    ]


def _training(settings: Mapping[str, Any]) -> list[str]:
    """The settings that say something of data and training, as the job's record has them."""
    shown = {name: settings[name] for name in ("data", "train", "method", "options", "weights") if name in settings}
    if not shown:
        return []
    return ["", "## Made with", "", "```json", json.dumps(shown, indent=2), "```"]


def _measures(measured: Mapping[str, Mapping[str, float]], metrics: list[str]) -> list[str]:
    if not metrics:
        return []
    rows = (
        f"| {task} | {' | '.join(f'{figures[name]:.4g}' if name in figures else '' for name in metrics)} |"
        for task, figures in measured.items()
    )
    head = [
        "",
        "## Measured on the test rows",
        "",
        f"| task | {' | '.join(metrics)} |",
        "|---" * (1 + len(metrics)) + "|",
    ]
    return [*head, *rows]
