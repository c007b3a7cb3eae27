"""Which layers of a model an adapter's targets are."""

import fnmatch
import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from lori_dist.adapter.bases import is_conv1d, is_product, is_quantized
from lori_dist.adapter.experts import Expert, is_experts, matrices
from lori_dist.adapter.probe import probe
from lori_dist.adapter.targets import is_number, kind, unnumbered
from lori_dist.errors import AdapterError
from lori_dist.plugin import nearest

log = logging.getLogger(__name__)


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """A transformers model, as far as `all-linear` has to know it."""

    def get_output_embeddings(self) -> nn.Module | None: ...


def match(
    model: nn.Module,
    targets: str | tuple[str, ...],
    modules_to_save: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> dict[str, nn.Module]:
    """The linear layers that targets name, in the model's order.

    targets: `all-linear`, or names (`q_proj`), paths, or patterns over whole paths (`model.layers.*.mlp.*`). Fused
    experts count as a layer for each expert, named after the weight and the number (`experts.down_proj.3`). exclude:
    what to leave out of them, written in the same way; a name or path also stands for all layers within that module.
    `all-linear` leaves out the output embedding, what is in modules_to_save, layers that compute something else than a
    product (routers), and layers that never run when the model reads tokens, such as those of a vision tower or those
    whose weight is used without calling them; the log says which.
    Raises AdapterError for a target or an exclusion that matches nothing, listing what there is, and for named layers
    that cannot be adapted.
    """
    excluded = _excluded(model, exclude)
    if targets == "all-linear":
        chosen = _all_linear(model, modules_to_save, excluded)
    else:
        wanted = (targets,) if isinstance(targets, str) else targets
        found = {path for target in wanted for path in _named(model, target)} - excluded
        chosen = {path: module for path, module in linear_layers(model).items() if path in found}
    if not chosen:
        without = f" after exclude ({', '.join(exclude)})" if exclude else ""
        raise AdapterError(f"targets: no linear layer is left{without}; {listing(linear_layers(model))}")
    known = probe(model)
    for path, module in chosen.items():
        refuse_unadaptable(model, path, module)
        if known.is_idle(_module_path(path, module)):
            raise AdapterError(
                f"targets: {path} is never called when {type(model).__name__} reads tokens (its weight is used "
                "directly, or only for other inputs), so an adapter there would have no effect; remove it from the "
                "targets, or name it in exclude"
            )
    return chosen


def _all_linear(model: nn.Module, modules_to_save: Sequence[str], excluded: Collection[str]) -> dict[str, nn.Module]:
    output = model.get_output_embeddings() if isinstance(model, HasOutputEmbeddings) else None
    whole = tuple(f"{name}." for name in modules_to_save)
    known = probe(model)
    chosen: dict[str, nn.Module] = {}
    left: dict[str, list[str]] = {}
    for path, module in linear_layers(model).items():
        if module is output or path in excluded or any(f".{name}" in f".{path}." for name in whole):
            continue
        if known.is_idle(_module_path(path, module)):
            left.setdefault(f"never called when {type(model).__name__} reads tokens", []).append(path)
        elif not _is_adaptable(module):
            left.setdefault(f"a {type(module).__name__}, which is not a plain linear layer", []).append(path)
        else:
            chosen[path] = module
    for reason, paths in left.items():
        _say_once(f"targets: all-linear leaves out {len(paths)} layers, each {reason}: {', '.join(_summary(paths))}")
    return chosen


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)


def _summary(paths: Sequence[str]) -> list[str]:
    """Paths, those that differ in numbers alone as one with `*`."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths))


def _excluded(model: nn.Module, exclude: Sequence[str]) -> set[str]:
    linear = linear_layers(model)
    found: set[str] = set()
    for wanted in exclude:
        is_pattern = any(character in wanted for character in "*?[")
        paths = {
            path
            for path in linear
            if (fnmatch.fnmatchcase(path, wanted) if is_pattern else f".{wanted}." in f".{path}.")
        }
        if not paths:
            names = set(map(kind, linear))
            raise AdapterError(f"exclude: {wanted!r} matches nothing; {listing(linear)}{nearest(wanted, names)}")
        found |= paths
    return found


def _module_path(path: str, module: nn.Module) -> str:
    """Path of the module that is called: for an expert's matrix, the one of all experts together."""
    return path.rsplit(".", 2)[0] if isinstance(module, Expert) else path


def _named(model: nn.Module, target: str) -> list[str]:
    linear = linear_layers(model)
    if target in linear:
        return [target]
    is_pattern = any(character in target for character in "*?[")
    paths = [
        path
        for path, module in linear.items()
        if (fnmatch.fnmatchcase(path, target) if is_pattern else _is_called(path, module, target))
    ]
    if paths:
        return paths
    other = next((module for path, module in model.named_modules() if path and f".{path}".endswith(f".{target}")), None)
    if other is not None:
        raise AdapterError(f"targets: {target!r} is a {type(other).__name__}, not a linear layer; {listing(linear)}")
    names = set(map(kind, linear))
    raise AdapterError(f"targets: {target!r} matches nothing; {listing(linear)}{nearest(target, names)}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            found[path] = module
        elif is_experts(module):
            found.update(matrices(path, module))
    return found


def _is_called(path: str, module: nn.Module, target: str) -> bool:
    """Whether the path ends with the target, its numbers at the end apart; a number alone is not an expert's name."""
    name = unnumbered(path)
    paths = [name] if isinstance(module, Expert) and is_number(target) else [path, name]
    return any(f".{one}".endswith(f".{target}") for one in paths)


def listing(paths: Mapping[str, nn.Module]) -> str:
    names = sorted(set(map(kind, paths)))
    return f"the model's linear layers are called {', '.join(names) or '(there are none)'}."


def _is_adaptable(module: nn.Module) -> bool:
    return is_conv1d(module) or is_quantized(module) or isinstance(module, Expert) or is_product(module)


def refuse_unadaptable(model: nn.Module, path: str, module: nn.Module) -> None:
    if not _is_adaptable(module):
        raise AdapterError(
            f"targets: {path} is a {type(module).__name__}, which does not compute a linear layer's product or is "
            "quantised by an unknown library (known are bitsandbytes and torchao); remove it from the targets, or name "
            "it in exclude"
        )
    held = module.experts if isinstance(module, Expert) else module
    places = [place for place, other in model.named_modules(remove_duplicate=False) if other is held]
    if len(places) > 1:
        raise AdapterError(
            f"targets: {' and '.join(places)} are one and the same layer; A belongs to one path, "
            "so remove it from the targets or give each place its own layer"
        )
