"""An exported LoRA folder is read once more, as its readers do, and compared with the adapter it was made of.

A folder that is whole can still be another adapter to its reader: PEFT moves targets of some models to other weights.
So the comparison is on the base's own structure, in which no weight takes memory, or, where the base is not at hand, on
a structure of the adapter's modules alone.
"""

import importlib.util
import logging
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter, in_memory
from lori_dist.adapter.attach import trained_on
from lori_dist.adapter.update import split
from lori_dist.errors import AdapterError
from lori_dist.integrations._peft_rules import EXPERT, UNFOLDED
from lori_dist.training.weights import without_weights

TOLERANCE = 1e-4
"""Relative, between what an update makes of random inputs here and there; a wrong one differs by about 1."""

log = logging.getLogger(__name__)


def settings_of(base_model_name: str) -> PreTrainedConfig | None:
    """The base's configuration where it is on this machine, a folder or in the hub's cache; nothing is downloaded."""
    try:
        return AutoConfig.from_pretrained(base_model_name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise nearly any class
        log.info("%s: the base model was not found (%s)", base_model_name, str(error).partition("\n")[0])
        return None


def structure(adapter: Adapter, settings: PreTrainedConfig | None) -> nn.Module:
    """The base model without weights: every parameter is a zero that takes no memory.

    settings: the base's; without them it has the adapter's modules alone, which leaves out whatever follows from the
    others. Raises AdapterError where a module of the base has another shape than the adapter's.
    """
    made = None if settings is None else _of_base(adapter, settings)
    if made is None:
        made = _of_adapter(adapter)
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[name] = empty.setdefault(parameter, nn.Parameter(zero, requires_grad=False))
    return made


def compare(folder: Path, adapter: Adapter, settings: PreTrainedConfig | None) -> None:
    """Raises AdapterError unless a LoRA folder is this adapter to PEFT.

    Without PEFT the reader of this package takes its place; what was written follows the rules in `_peft_rules`.
    settings: the base's, as of `settings_of`.
    """
    if importlib.util.find_spec("peft") is None:
        log.info("%s: PEFT is not installed, so the folder follows its known rules, but was not read by it", folder)
        if not adapter.saved and not any(map(EXPERT.fullmatch, adapter.shapes)):
            compare_as_read(folder, adapter)
        return
    from lori_dist.integrations import _by_peft

    base = structure(adapter, settings)
    try:
        found, saved = _by_peft.read(folder, base)
    except Exception as error:  # PEFT raises nearly any class
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(
            f"export: PEFT cannot load the adapter on this base model ({type(error).__name__}: {reason}); {UNFOLDED}"
        ) from error
    _compare_updates(adapter, found, "PEFT loads the folder on this base model")
    for name, tensor in adapter.saved.items():
        if name not in saved or not torch.equal(saved[name].float(), in_memory(tensor).float()):
            raise AdapterError(
                f"export: {name}, which was trained in full, has other values when PEFT loads it; {UNFOLDED}"
            )


def compare_as_read(folder: Path, adapter: Adapter) -> None:
    """Raises AdapterError unless a LoRA folder, with its mask if there is one, is this adapter to `lori`."""
    again = formats.open_lazy(folder)
    found = {}
    for module, shape in again.shapes.items():
        parts = split(again, module, shape).kept
        if parts:
            found[module] = torch.cat([part.a() for part in parts]), torch.cat([part.scaled_b() for part in parts], 1)
    _compare_updates(adapter, found, "lori reads the folder")


def _compare_updates(adapter: Adapter, found: Mapping[str, tuple[Tensor, Tensor]], when: str) -> None:
    generator = torch.Generator().manual_seed(0)
    probes: dict[int, Tensor] = {}
    for module, shape in adapter.shapes.items():
        update = split(adapter, module, shape)
        if shape[1] not in probes:
            probes[shape[1]] = torch.randn(shape[1], 2, generator=generator, dtype=torch.float64)
        x = probes[shape[1]]
        wanted = torch.zeros(shape[0], 2, dtype=torch.float64)
        for part in update.kept:
            wanted += part.scaled_b() @ (part.a() @ x)
        theirs = torch.zeros_like(wanted)
        if module in found:
            a, b = found[module]
            theirs = b.double() @ (a.double() @ x)
        if theirs.shape != wanted.shape or (theirs - wanted).norm() > TOLERANCE * wanted.norm():
            what = "not adapted" if module not in found else "adapted otherwise"
            raise AdapterError(f"export: {module} is {what} when {when}; {UNFOLDED}")
    for module, (_, b) in found.items():
        if module not in adapter.shapes and bool(b.any()):
            raise AdapterError(f"export: {module}, which is not a target, is adapted when {when}; {UNFOLDED}")


# --- structures ------------------------------------------------------------------------------------------------------


def _of_base(adapter: Adapter, settings: PreTrainedConfig) -> nn.Module | None:
    """None where the adapter's modules are those of another class, such as a model with a head of the user's own."""
    try:
        made = without_weights(settings, torch.float32)
    except Exception as error:  # the libraries raise nearly any class
        log.info("the base model cannot be made (%s)", str(error).partition("\n")[0])
        return None
    there = {path for path, _ in made.named_modules()}
    if not all(_layer(path) in there for path in adapter.shapes):
        log.info("the adapter was made on another class than %s", type(made).__name__)
        return None
    trained_on(made, adapter)  # shapes that differ are another base's
    return made


def _layer(path: str) -> str:
    """The module that a target is, or, of an expert's matrix, that it is in."""
    fused = EXPERT.fullmatch(path)
    return path if fused is None else fused[1]


class _Node(nn.Module):
    """A place in a path."""


class _Experts(nn.Module):
    """Fused weights of experts."""

    is_transposed = False


def _of_adapter(adapter: Adapter) -> nn.Module:
    root = _Node()
    root.config = types.SimpleNamespace(model_type=adapter.base.get("model_type"), to_dict=dict)  # type: ignore[assignment]
    counts: dict[str, int] = {}
    for path in adapter.shapes:
        if EXPERT.fullmatch(path):
            weight = path.rpartition(".")[0]
            counts[weight] = counts.get(weight, 0) + 1
    for path, (out_features, in_features) in adapter.shapes.items():
        fused = EXPERT.fullmatch(path)
        if fused is None:
            _put(root, path, nn.Linear(in_features, out_features, bias=False, device="meta"))
        else:
            held = _put(root, fused[1], _Experts())
            shape = (counts[path.rpartition(".")[0]], out_features, in_features)
            held.register_parameter(fused[2], nn.Parameter(torch.empty(shape, device="meta")))
    for name, tensor in adapter.saved.items():
        parent, _, leaf = name.rpartition(".")
        _put(root, parent, _Node()).register_parameter(leaf, nn.Parameter(torch.empty(tensor.shape, device="meta")))
    return root


def _put(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module at a path, which is `module` where there is none yet."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, _Node())
        root = root.get_submodule(name)
    if last not in root._modules:
        root.add_module(last, module)
    return root.get_submodule(last)
