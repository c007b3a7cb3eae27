"""Measured figures of a model on disk, written as they come, so that a killed evaluation does not measure them
again."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lori_dist import atomic
from lori_dist.evaluation._rows import Row
from lori_dist.folder import is_sealed, read_lines, sealed
from lori_dist.scores import MEASURED, PREDICTIONS

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Task and metric; of lm-eval's tasks together, `LM_EVAL` and nothing."""
LM_EVAL: Key = ("lm_eval", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One metric of one task, or all of lm-eval's."""

    values: Mapping[str, Mapping[str, float]]
    """Task -> metric -> value; empty where the metric does not apply."""
    interval: tuple[float, float] | None = None
    """Confidence interval of an accuracy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """The figures and predictions of one model."""

    measured: Path
    predictions: Path
    label: Mapping[str, Any] = field(default_factory=dict)
    """Start of each line; lines of other labels are another model's."""
    origin: str = ""
    """Digest of all that the figures depend on; figures of another origin do not count."""

    @classmethod
    def of_folder(cls, folder: Path) -> "Store":
        """The store of a model whose evaluation has a folder of its own."""
        return cls(measured=folder / MEASURED, predictions=folder / PREDICTIONS)

    def records(self) -> list[dict[str, Any]]:
        """The measured figures in the form of an evaluation's records; without seconds, which are not stored."""
        return [
            {"metric": metric, "task": task, "value": value, "seconds": 0.0}
            for measured in self.read().values()
            for task, values in measured.values.items()
            for metric, value in values.items()
        ]

    def read(self) -> dict[Key, Measured]:
        """The measured figures that can be read. Predictions of anything else are removed."""
        records, num_bad = read_lines(self.measured)
        whole = [record for record in records if is_sealed(record) and "measured" in record]
        num_bad += len(records) - len(whole)
        if num_bad:
            log.warning("%s: %d lines are damaged; what they say is measured again", self.measured, num_bad)
            atomic.write_text(self.measured, "".join(json.dumps(record) + "\n" for record in whole))
        mine = [record for record in whole if self._is_mine(record) and record.get("origin", "") == self.origin]
        found = {_key(record): _measured(record) for record in mine}
        self._prune(found)
        return found

    def write(self, key: Key, measured: Measured, rows: Sequence[Row]) -> None:
        """Adds what was measured; first the predictions, which count only with it."""
        for number, row in enumerate(rows):
            place = {"task": key[0], "metric": key[1], "row": number + 1}
            line = {key: value for key, value in asdict(row).items() if key != "weight"}
            atomic.append_json(self.predictions, {**self.label, **place, **line})
        record = {
            "measured": list(key),
            "values": measured.values,
            "interval": measured.interval,
            "origin": self.origin,
        }
        atomic.append_json(self.measured, sealed({**self.label, **record}), flush=True)

    def _is_mine(self, record: Mapping[str, Any]) -> bool:
        return all(record.get(key) == value for key, value in self.label.items())

    def _prune(self, found: Mapping[Key, Measured]) -> None:
        """Lines of a measurement that did not come to its end."""
        lines, num_bad = read_lines(self.predictions)
        kept = [line for line in lines if not self._is_mine(line) or (line.get("task"), line.get("metric")) in found]
        if num_bad or len(kept) < len(lines):
            atomic.write_text(self.predictions, "".join(json.dumps(line) + "\n" for line in kept))


def _key(record: Mapping[str, Any]) -> Key:
    task, metric = record["measured"]
    return task, metric


def _measured(record: Mapping[str, Any]) -> Measured:
    interval = record["interval"]
    return Measured(values=record["values"], interval=None if interval is None else (interval[0], interval[1]))
