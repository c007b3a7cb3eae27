"""An adapter from wherever it is: a file of ours, a folder of PEFT, or a checkpoint of LoRI's official code."""

from pathlib import Path
from typing import Any

from lori_dist.adapter import file, lori_folder, official, peft_folder
from lori_dist.adapter.adapter import Adapter, loaded
from lori_dist.errors import AdapterError


def load(path: Path) -> Adapter:
    """The adapter at a path. Raises AdapterError that begins with the path and says what is wrong there."""
    return loaded(opened(path))


def opened(path: Path) -> Adapter:
    """Does what `load` does, but leaves the tensors in the file until they are used."""
    if not path.is_dir():
        if path.name in peft_folder.NAMES and peft_folder.is_one(path.parent):
            raise AdapterError(f"{path}: this is a file of a LoRA folder of PEFT; give the folder, {path.parent}")
        return file.opened(path)
    if not peft_folder.is_one(path):
        raise AdapterError(f"{path}: this is a folder without {peft_folder.CONFIG}; {_instead(path)}")
    try:
        if lori_folder.is_one(path):
            return lori_folder.opened(path)
        return official.opened(path) if official.is_one(path) else peft_folder.opened(path)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def base(path: Path) -> dict[str, Any]:
    """The description of the base model of the adapter at a path; no tensor of a file is read. Raises as `load`."""
    return dict(opened(path).base if path.is_dir() else file.header(path)["base"])


def _instead(folder: Path) -> str:
    ours = folder / "adapter.safetensors"  # as jobs leave it
    if ours.exists():
        return f"give the adapter file itself, {ours}"
    return "give an adapter file, a LoRA folder of PEFT, or a checkpoint of LoRI's official code"
