"""Layouts of adapters on disk, one file each; `load` and `open_lazy` below read an adapter of any of them.

native.py is the adapter file, forms.py that of a form in which tasks have updates of their own, peft.py a LoRA folder
of PEFT, tuner.py a folder that PEFT saved with `LoriConfig`, official.py a checkpoint of LoRI's official code. lazy.py
has entries that are read once they are used, spool.py results of a merge that wait on disk; checks.py and patterns.py
validate what others have written. Files that exist must stay readable. A new layout is a file with `is_one(folder)`
and `open_lazy(folder)`, which `open_lazy` below tries.
"""

from pathlib import Path
from typing import Any

from lori_dist.adapter.adapter import Adapter, loaded
from lori_dist.adapter.task_adapter import TaskAdapter
from lori_dist.errors import AdapterError
from lori_dist.formats import forms, native, official, peft, tuner
from lori_dist.formats.lazy import naming


def load(path: Path) -> Adapter:
    """The adapter at a path. Raises AdapterError that begins with the path and says what is wrong there."""
    return loaded(open_lazy(path))


def open_lazy(path: Path) -> Adapter:
    """Does what `load` does, but leaves the tensors in the file until they are used."""
    if (of_task := _of_task(path)) is not None:
        return forms.load_task(*of_task)
    if not path.is_dir():
        if path.name in peft.NAMES and peft.is_one(path.parent):
            raise AdapterError(f"{path}: this is a file of a LoRA folder of PEFT; give the folder, {path.parent}")
        return native.open_lazy(path)
    if not peft.is_one(path):
        raise AdapterError(f"{path}: this is a folder without {peft.CONFIG}; {_instead(path)}")
    try:
        if tuner.is_one(path):
            return tuner.open_lazy(path)
        return official.open_lazy(path) if official.is_one(path) else peft.open_lazy(path)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def by_task(path: Path) -> dict[str | None, Adapter]:
    """Task -> its adapter, of a file in which each has an update of its own; of all others None -> the adapter.

    Raises as `load`.
    """
    if is_form(path):
        return dict(forms.load_tasks(path).items())
    return {None: load(path)}


def by_task_or_whole(path: Path) -> dict[str | None, Adapter | TaskAdapter]:
    """What `by_task` gives, and of a form whose update depends on the input None -> what can be attached as it is."""
    if is_form(path) and (whole := forms.load(path)).form.is_dependent:
        return {None: whole}
    return dict(by_task(path).items())


def load_whole(path: Path) -> Adapter | TaskAdapter:
    """What `load` gives, or an adapter of a form whose update depends on the input. Raises as `load`."""
    found = by_task_or_whole(path) if is_form(path) else {}
    return found[None] if None in found else load(path)


def is_form(path: Path) -> bool:
    """Whether there is a file of another form than lori, without an update for all rows that factors could give."""
    if not path.is_file():
        return False
    with naming(path, "read"), native.opened(path) as file:
        return forms.is_one(native.parsed(file))


def is_there(path: Path) -> bool:
    """Whether there is a file or folder, or a file with an update for each task of which `PATH@TASK` names one."""
    return path.exists() or _of_task(path) is not None


def _of_task(path: Path) -> tuple[Path, str] | None:
    """The file and the task that `PATH@TASK` names."""
    file, _, task = path.name.rpartition("@")
    found = path.with_name(file) if file and task else None
    return (found, task) if found is not None and not path.exists() and found.is_file() else None


def base(path: Path) -> dict[str, Any]:
    """The description of the base model of the adapter at a path; no tensor of a file is read. Raises as `load`."""
    if path.is_dir() or _of_task(path) is not None:
        return dict(open_lazy(path).base)
    return dict(native.header(path)["base"])


def _instead(folder: Path) -> str:
    ours = folder / "adapter.safetensors"  # as jobs leave it
    if ours.exists():
        return f"give the adapter file itself, {ours}"
    return "give an adapter file, a LoRA folder of PEFT, or a checkpoint of LoRI's official code"
