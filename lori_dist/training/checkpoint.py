"""Files a job resumes from: the portable state and nothing else. Any engine on any number of ranks can read them.

A file is `<phase>-<step>.safetensors` with tensors `<quantity>/<module path>`. Its metadata has one key, `lori`, with a
JSON object: format, phase, step, modules (their paths, in the model's order), fingerprint (of what determines the
result) and digest (over all the rest).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lori_dist.errors import JobError
from lori_dist.training.engine import State

FORMAT = "lori-checkpoint-1"
KEY = "lori"
QUANTITIES = ("values", "exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


def save(folder: Path, phase: str, state: State, *, fingerprint: str, keep: int) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep` of its phase. One process calls this.

    The file appears by a rename: a kill at any time leaves the previous checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{phase}-{state.step:08d}.safetensors"
    write(path, phase, state, fingerprint=fingerprint)
    for old in _files(folder, phase)[keep:]:
        old.unlink()
    return path


def newest(folder: Path, phase: str, fingerprint: str) -> State | None:
    """The newest checkpoint of a phase, or None if there is none.

    A damaged file is passed over with a warning that names it, and the one before it is taken. Raises JobError for a
    checkpoint of another fingerprint: it belongs to another configuration.
    """
    for path in _files(folder, phase):
        try:
            return read(path, phase, fingerprint=fingerprint)
        except Damaged as error:
            log.warning("%s; continuing from the checkpoint before it, if there is one", error)
    return None


def delete(folder: Path, phase: str) -> None:
    """Deletes all checkpoints of a phase."""
    for path in _files(folder, phase):
        path.unlink()


def write(path: Path, phase: str, state: State, *, fingerprint: str) -> None:
    """Writes one state to a file of any name, by a rename."""
    tensors = {f"{quantity}/{module}": t for quantity in QUANTITIES for module, t in getattr(state, quantity).items()}
    header = {
        "format": FORMAT,
        "phase": phase,
        "step": state.step,
        "modules": list(state.values),  # safetensors has an order of its own, and ties in masks go by this one
        "fingerprint": fingerprint,
    }
    partial = path.with_name(f".{path.name}.partial")
    # One key, as safetensors writes several in any order, and the same state is to give the same bytes.
    metadata = {KEY: json.dumps({**header, "digest": _digest(header, tensors)})}
    content = safetensors.torch.save(tensors, metadata=metadata)
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    _flush_folder(path.parent)


def read(path: Path, phase: str, *, fingerprint: str) -> State:
    """The state in a file. Raises JobError if it is damaged, or belongs to another phase or fingerprint."""
    tensors, header = _load(path)
    if header["phase"] != phase or header["fingerprint"] != fingerprint:
        raise JobError(
            f"{path}: holds phase {header['phase']} of fingerprint {header['fingerprint']}; wanted {phase} of "
            f"{fingerprint}; the configuration or its inputs have changed, so delete {path.parent} or use another "
            "output folder"
        )
    parts = {
        quantity: {module: tensors[name] for module in header["modules"] if (name := f"{quantity}/{module}") in tensors}
        for quantity in QUANTITIES
    }
    return State(step=header["step"], **parts)


class Damaged(JobError):
    """What a file says about itself is not so."""


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise Damaged(f"{path}: cannot be read as a checkpoint ({error}); it is damaged") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Damaged(f"{path}: is not of format {FORMAT}; it is damaged or was written by another version")
    digest = header.pop("digest", "")
    if digest != _digest(header, tensors):
        raise Damaged(f"{path}: its content does not match its digest; it is damaged")
    return tensors, header


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(json.dumps((name, str(tensor.dtype), list(tensor.shape))).encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _files(folder: Path, phase: str) -> list[Path]:
    """Newest first."""
    pattern = re.compile(rf"{re.escape(phase)}-\d{{8,}}\.safetensors")
    found = [path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)


def _flush_folder(folder: Path) -> None:
    """Puts a rename where a power cut leaves it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
