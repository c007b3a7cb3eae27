"""Adapters that LoRI's official code has written (juzhengz/LoRI): LoRA folders of PEFT, with masks as pickles.

Their A is stored. LoRI-D: B is dense, and `masks/` holds what was taken from it for the sparse phase, a mask for each
sparsity. LoRI-S: B is zero outside of one mask, which may lie in the folder itself or in `masks/`; where there is none,
B's zeros say as much.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError
from lori_dist.files import require_regular
from lori_dist.formats import peft
from lori_dist.formats.checks import named

_FILE = re.compile(r"(?P<sparsity>0(?:\.\d+)?|1(?:\.0+)?)_mask\.pt\Z")
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.lora_B(?:\.default)?(?:\.weight)?)?\Z")

TOLERANCE = 0.005
"""Between a mask's sparsity and the one its file is named after: ties of B are all kept, and counts are rounded."""


def is_one(folder: Path) -> bool:
    return bool(_files(folder))


def open_lazy(folder: Path) -> Adapter:
    """The adapter of a checkpoint, sparse where its mask says so.

    Raises AdapterError as `peft_folder.opened`, for a mask that is not what its name says or that is of other modules,
    and for a B that is not zero outside of its mask.
    """
    found = peft.read(folder)
    own: dict[str, Tensor] | None = None
    for file in _files(folder):
        mask = read_mask(file, {module: factors.b.shape for module, factors in found.items()})
        if _is_own(file, folder, mask, found) and (own is None or _num_kept(mask) < _num_kept(own)):
            own = mask
    return peft.adapter(folder, found, own or {})


def read_mask(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Module -> (out_features, rank) bool. shapes: those of B. Raises AdapterError as `opened`."""
    file_name = _FILE.match(file.name)
    if file_name is None:
        raise AdapterError(f"{file.name}: the name has no sparsity; wanted one such as 0.9_mask.pt")
    try:
        require_regular(file)
        # Mapped, a mask takes memory as it is read; files of torch before 1.6 are no archives and have to be loaded.
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what a damaged pickle can raise has no common class
        reason = named(str(error).partition("\n")[0])
        raise AdapterError(f"{file.name}: holds more than tensors, or is damaged ({reason}); it is not read") from error
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise AdapterError(f"{file.name}: holds {type(held).__name__}; wanted module names and their masks")
    mask = {}
    for name, tensor in held.items():
        match = _NAME.match(name)
        module = match["module"] if match is not None else name
        if module not in shapes:
            raise AdapterError(
                f"{named(module)}: {file.name} has a mask for it, but the adapter does not have this module; give "
                "the mask it was "
                "trained with"
            )
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool or tensor.shape != shapes[module]:
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = f"torch.bool {tuple(shapes[module])}"
            raise AdapterError(f"{named(module)}: its mask in {file.name} is {found}; wanted {wanted}")
        mask[module] = tensor
    if missing := shapes.keys() - mask.keys():
        raise AdapterError(f"{named(min(missing))}: {file.name} has no mask of it; give the mask it was trained with")
    _check_sparsity(file, float(file_name["sparsity"]), mask)
    return mask


def _check_sparsity(file: Path, named: float, mask: Mapping[str, Tensor]) -> None:
    total = sum(tensor.numel() for tensor in mask.values())
    found = 1 - _num_kept(mask) / total
    if abs(found - named) * total > max(len(mask), TOLERANCE * total):
        raise AdapterError(
            f"{file.name}: its sparsity is {found:.4f}, not the {named:g} of its name; give the mask it was trained "
            "with"
        )


def _is_own(file: Path, folder: Path, mask: Mapping[str, Tensor], found: Mapping[str, peft.Factors]) -> bool:
    """Whether B is zero outside of the mask. It is not where the mask was taken from this B, which is the dense one."""
    outside = {
        module: int(((peft.finite(module, "B", found[module].b) != 0) & ~tensor).sum())
        for module, tensor in mask.items()
    }
    num_outside = sum(outside.values())
    num_left_out = sum(tensor.numel() for tensor in mask.values()) - _num_kept(mask)
    if num_outside == 0:
        return True
    if file.parent != folder and num_outside > num_left_out / 2:
        return False
    module = next(module for module, number in outside.items() if number)
    raise AdapterError(
        f"{module}: B has {outside[module]} entries that are not zero outside of {file.name}; give the mask it was "
        "trained with, or remove the file"
    )


def _num_kept(mask: Mapping[str, Tensor]) -> int:
    return sum(int(tensor.sum()) for tensor in mask.values())


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*_mask.pt")), *sorted(folder.glob("masks/*_mask.pt"))]
