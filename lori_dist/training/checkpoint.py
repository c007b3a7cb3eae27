"""Files a job resumes from: the portable state and nothing else. Any engine on any number of ranks can read them.

A file is `<phase>-<step>.safetensors` with flat tensors `values`, `exp_avg` and `exp_avg_sq`, the modules' kept entries
one after the other, and `digest`, 16 bytes over all the rest. Its metadata has one key, `lori`, with a JSON object:
format, phase, step (updates done), skipped (steps besides, if any), modules (path -> entries, in the model's order),
origin (of what it is a state) and, if any, notes (what the loop of steps knows of those before). Which rows a step
takes and what random generators give follow from the origin's seed and the number of steps.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lori_dist.errors import JobError
from lori_dist.tensors import Stored, metadata, stored, write
from lori_dist.training.engine import QUANTITIES, Engine, Quantity, State, entries, gather_in_turn
from lori_dist.training.world import World

FORMAT, UNORDERED = "lori-checkpoint-3", "lori-checkpoint-2"
"""The format that is written, and the one of earlier versions, whose digest does not depend on the order of the
modules."""
KEY = "lori"
DIGEST_BYTES = 16
LISTED = 5
"""Differences that an error shows."""

Origin = Mapping[str, Any]
"""All that a state belongs to, as plain JSON: another one is refused, naming what differs."""

log = logging.getLogger(__name__)


def save(
    folder: Path,
    phase: str,
    engine: Engine,
    world: World,
    *,
    origin: Origin,
    keep: int,
    still_mine: Callable[[], None] = lambda: None,
    skipped: int = 0,
    spare: int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep` of its phase. Every rank calls this; rank 0 writes.

    Rank 0 holds a piece at a time. The file appears by a rename: a kill at any byte leaves the previous
    checkpoints as they were. still_mine: called on rank 0 before anything is written. skipped: steps whose updates were
    left out. spare: a step whose checkpoint stays. notes: plain JSON that comes back with the state.
    """
    path = file_of(folder, phase, engine.num_steps + skipped)
    if world.rank == 0:
        still_mine()
        folder.mkdir(parents=True, exist_ok=True)
    write_state(path, phase, engine, world, origin=origin, skipped=skipped, notes=notes)
    if world.rank == 0:
        spared = None if spare is None else file_of(folder, phase, spare)
        cut_off = folder.glob(f".{phase}-*.partial")  # by a kill
        for old in (*_files(folder, phase)[keep:], *cut_off):
            if old != spared:
                old.unlink()
    return path


def file_of(folder: Path, phase: str, step: int) -> Path:
    """The checkpoint after so many steps, those whose updates were left out among them."""
    return folder / f"{phase}-{step:08d}.safetensors"


def newest(folder: Path, phase: str, origin: Origin) -> State | None:
    """The newest checkpoint of a phase, or None if there is none.

    A damaged file is passed over with a warning that names it, and the one before it is taken. Raises JobError for a
    checkpoint of another origin, saying what differs.
    """
    for path in _files(folder, phase):
        try:
            return read(path, phase, origin=origin)
        except Damaged as error:
            log.warning("%s; continuing from the checkpoint before it, if there is one", error)
    return None


def delete(folder: Path, phase: str) -> None:
    """Deletes all checkpoints of a phase."""
    for path in _files(folder, phase):
        path.unlink()


def write_state(
    path: Path,
    phase: str,
    engine: Engine,
    world: World,
    *,
    origin: Origin,
    quantities: Sequence[Quantity] = QUANTITIES,
    skipped: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes an engine's state, or some quantities of it, to a file of any name. Every rank calls this; rank 0 writes,
    and holds some of it at a time."""
    modules = entries(engine, world)
    if world.rank > 0:
        for quantity in quantities:
            for _ in gather_in_turn(engine, quantity, world):
                pass
        return
    header = {
        "format": FORMAT,
        "phase": phase,
        "step": engine.num_steps,
        **({"skipped": skipped} if skipped else {}),
        "modules": modules,
        "origin": dict(origin),
        **({"notes": dict(notes)} if notes else {}),
    }
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    layout = {quantity: (torch.float32, (sum(modules.values()),)) for quantity in quantities}
    layout["digest"] = (torch.uint8, (DIGEST_BYTES,))
    digest = _digest(header)

    def pieces() -> Iterator[Tensor]:
        for quantity in quantities:
            for held in gather_in_turn(engine, quantity, world):
                for tensor in held.values():
                    digest.update(tensor.numpy().data)
                    yield tensor
        yield torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    write(path, layout, pieces(), {KEY: json.dumps(header)})


def read(path: Path, phase: str, *, origin: Origin) -> State:
    """The state in a file; quantities it lacks are empty. Its tensors are maps of the file, so a rank that takes its
    share of each holds no more than that.

    Raises JobError if it is of another phase or origin, and Damaged, which is one, if it is not what was written.
    """
    header, found = _verified(path, phase, origin)
    modules = header["modules"]
    parts = {
        quantity: dict(zip(modules, found[quantity].mapped().split(list(modules.values())), strict=True))
        if quantity in found
        else {}
        for quantity in QUANTITIES
    }
    return State(step=header["step"], skipped=header.get("skipped", 0), notes=header.get("notes", {}), **parts)


def check(path: Path, phase: str, *, origin: Origin) -> tuple[dict[str, int], Stored]:
    """Module path -> its entries, and where the values of all lie, one after the other. Raises what `read` raises."""
    header, found = _verified(path, phase, origin)
    return header["modules"], found["values"]


class Damaged(JobError):
    """A checkpoint's content contradicts its own header."""


def _refuse_another(path: Path, header: Mapping[str, Any], phase: str, origin: Origin) -> None:
    if header["phase"] != phase or header["origin"] != json.loads(json.dumps(origin)):
        raise JobError(
            f"{path}: is a checkpoint of something else: {_differences(header, phase, origin)}; delete {path.parent}, "
            "or use another output folder"
        )


def _differences(header: Mapping[str, Any], phase: str, origin: Origin) -> str:
    """Each setting that is another one, by its path."""
    there = _leaves({"phase": header["phase"], **header["origin"]})
    here = _leaves({"phase": phase, **json.loads(json.dumps(origin))})
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    names.sort(key=lambda name: name == "fingerprint")  # it follows from the others
    shown = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names[:LISTED]]
    return ", ".join(shown) + (f", and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {
        name: leaf
        for key, item in tree.items()
        for name, leaf in _leaves(item, f"{path}.{key}" if path else str(key)).items()
    }


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The header of a checkpoint, and the places of its tensors."""
    with _damage(path):
        found = stored(path)
        header = json.loads(metadata(path)[KEY])
        version, num_entries = header["format"], sum(header["modules"].values())
    if version not in (FORMAT, UNORDERED):
        raise Damaged(f"{path}: is not of format {FORMAT}; it is damaged or was written by another version")
    if any(
        (found[quantity].shape, found[quantity].dtype) != ((num_entries,), torch.float32) for quantity in _held(found)
    ):
        raise _other_content(path)
    return header, found


def _held(found: Mapping[str, Stored]) -> list[Quantity]:
    return [quantity for quantity in QUANTITIES if quantity in found]


def _verified(path: Path, phase: str, origin: Origin) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The header of a checkpoint and the places of its tensors, whose content was read once, a piece at a time."""
    header, found = _open(path)
    with _damage(path):
        digest = _digest(header)
        for quantity in _held(found):
            for piece in found[quantity].pieces():
                digest.update(piece.numpy().data)
        written = bytes(found["digest"].load().numpy())
    if written != digest.digest():
        raise _other_content(path)
    _refuse_another(path, header, phase, origin)
    return header, found


def _digest(header: Mapping[str, Any]) -> Any:
    """Digest of the header in its written order, since values belong to modules by their order."""
    text = json.dumps(header, sort_keys=header["format"] == UNORDERED)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read as a checkpoint ({error}); it is damaged") from error


def _other_content(path: Path) -> Damaged:
    return Damaged(f"{path}: its content does not match its digest; it is damaged")


def _files(folder: Path, phase: str) -> list[Path]:
    """Newest first."""
    pattern = re.compile(rf"{re.escape(phase)}-\d{{8,}}\.safetensors")
    found = [path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)
