"""Modules that are trained in full, such as the head of a classifier, and stored with the adapter."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lori_dist.adapter import sharded
from lori_dist.adapter.linear import shaped
from lori_dist.adapter.routing import Routing, name_of
from lori_dist.errors import AdapterError
from lori_dist.plugin import nearest

SAVED = "lori_saved"
"""Attribute in which an adapted model keeps the original values of such parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """A parameter as it was: its shape, which engines take away, and its values."""

    shape: tuple[int, ...]
    values: Tensor


def key(name: str) -> str:
    """The name of such a parameter among trained tensors, where those of modules are their paths."""
    return f"{name}:saved"


def is_saved(name: str) -> bool:
    return name.endswith(":saved")


def match(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """Name -> parameter of the modules that are named, by path or by its last part.

    Raises AdapterError for a name that fits no module, for one without parameters, and for parameters that are not
    float32, which training would round, or are used by other modules too.
    """
    chosen: dict[str, nn.Parameter] = {}
    for wanted in modules:
        paths = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{wanted}")]
        if not paths:
            known = {path.rpartition(".")[2] for path, module in model.named_modules() if [*module.parameters()]}
            raise AdapterError(f"modules_to_save: {wanted!r} is not a module.{nearest(wanted, known - {''})}")
        found = {
            f"{path}.{name}": parameter
            for path in paths
            for name, parameter in model.get_submodule(path).named_parameters()
        }
        if not found:
            raise AdapterError(f"modules_to_save: {wanted} has no parameter; name a module that can be trained")
        chosen.update(found)
    for name, parameter in chosen.items():
        if parameter.dtype != torch.float32:
            raise AdapterError(
                f"modules_to_save: {name} is {parameter.dtype}; load the model in float32, or that module alone"
            )
        places = [place for place, other in model.named_parameters(remove_duplicate=False) if other is parameter]
        if len(places) > 1:
            raise AdapterError(f"modules_to_save: {' and '.join(places)} are one parameter; untie it or remove it")
    return chosen


def train(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    """Lets parameters be trained, and keeps what they were."""
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    before = {
        name: Before(shape=sharded.shape(parameter), values=_kept(parameter)) for name, parameter in chosen.items()
    }
    setattr(model, SAVED, before)


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters the values that were saved. Raises AdapterError for a model that has no such parameters."""
    there = dict(model.named_parameters(remove_duplicate=False))
    before = {}
    for name, tensor in tensors.items():
        if name not in there or sharded.shape(there[name]) != tuple(tensor.shape):
            found = f"one of {sharded.shape(there[name])}" if name in there else "none of that name"
            raise AdapterError(
                f"{name}: the adapter has this parameter, of {tuple(tensor.shape)}, and the model {found}; use the "
                "base model it was trained on, in the same class"
            )
        before[name] = Before(shape=tuple(tensor.shape), values=_kept(there[name]))
        sharded.put(there[name], tensor)
    setattr(model, SAVED, before)


def take_back(model: nn.Module) -> None:
    """Gives parameters the values they had, and trains them no more."""
    for parameter in begin_again(model):
        parameter.requires_grad_(False)
    setattr(model, SAVED, {})


def begin_again(model: nn.Module) -> list[nn.Parameter]:
    """Gives parameters the values they had. Returns them."""
    there = dict(model.named_parameters(remove_duplicate=False))
    before: dict[str, Before] = getattr(model, SAVED, {})
    for name, was in before.items():
        sharded.put(there[name], was.values)
    return [there[name] for name in before]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is trained in full."""
    names = getattr(model, SAVED, {})
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape, whatever an engine made of the parameter."""
    return {name: before.shape for name, before in getattr(model, SAVED, {}).items()}


# --- of several adapters ---------------------------------------------------------------------------------------------


class RoutedModule(nn.Module):
    """A module that is trained in full, of which every adapter has a copy that its own rows meet.

    Its parameters are called `copy_0_0`, ...: adapter and place in the module.
    """

    def __init__(self, path: str, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.path, self.routing = path, routing
        if buffer := next((name for name, _ in base.named_buffers()), None):
            raise AdapterError(
                f"modules_to_save: {path} has a buffer ({buffer}), which cannot be kept apart for several adapters "
                "over one base; train them one at a time (cluster.packing: off)"
            )
        self.places = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
        copied = copy.deepcopy(base).requires_grad_(False)
        for module in copied.modules():  # the copies compute in the place of these
            for name, own in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(own.to("meta"), requires_grad=False))
        self.form = (copied,)  # in a tuple, so that it is no submodule
        for number in range(len(routing.names)):
            for place, parameter in enumerate(base.parameters()):
                self.register_parameter(f"copy_{number}_{place}", nn.Parameter(parameter.detach().clone()))

    @property
    def weight(self) -> Tensor:
        """The first copy's, for code that looks at its dtype or size."""
        return self.copies(0)["weight"]

    def copies(self, number: int) -> dict[str, nn.Parameter]:
        """Name in the module -> the parameter of one adapter."""
        return {name: getattr(self, f"copy_{number}_{place}") for place, name in enumerate(self.places)}

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        if more or options:
            raise AdapterError(
                f"modules_to_save: {self.path} is called with more than one tensor, so the rows of several adapters "
                "cannot be kept apart; train them one at a time (cluster.packing: off)"
            )
        segments = self.routing.segments(self.path, x if x.is_floating_point() else x[..., None])
        num_tokens, made, shape = segments[-1].tokens.stop, [], x.shape
        factor = max(1, num_tokens // max(1, len(x)))
        if any(segment.tokens.start % factor for segment in segments):  # tasks meet within a row
            x, factor = x.reshape(num_tokens, 1, *x.shape[2:]), 1
        apply = cast(Callable[..., Tensor], _ToSums.apply)
        for segment in segments:
            named = {
                name: apply(parameter, self.routing, self._name(name, segment.adapter))
                for name, parameter in self.copies(segment.adapter).items()
            }
            rows = slice(segment.tokens.start // factor, segment.tokens.stop // factor)
            if len(segments) == 1:
                rows = slice(None)
            made.append(torch.func.functional_call(self.form[0], named, (x[rows],)))
        done = torch.cat(made)
        return done if x.shape == shape else shaped(done, (*shape[:2], *done.shape[2:]))

    def _name(self, name: str, number: int) -> str:
        return name_of(key(f"{self.path}.{name}"), self.routing.names[number])


class _ToSums(torch.autograd.Function):
    """A parameter whose gradient goes to the sums of a routing."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, routing: Routing, name: str) -> Tensor:
        ctx.routing, ctx.name = routing, name
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.routing.sum_of(ctx.name, grad.numel(), grad.device).add_(grad.float().flatten())
        return None, None, None


def route(model: nn.Module, modules: Sequence[str], routing: Routing) -> None:
    """Puts a `RoutedModule` in place of each module that is named."""
    for wanted in modules:
        for path in [path for path, _ in model.named_modules() if f".{path}".endswith(f".{wanted}")]:
            parent, _, name = path.rpartition(".")
            made = RoutedModule(path, model.get_submodule(path), routing)
            setattr(model.get_submodule(parent), name, made.train(model.get_submodule(path).training))


def _routed(model: nn.Module) -> list[RoutedModule]:
    return [module for module in model.modules() if isinstance(module, RoutedModule)]


def copies(model: nn.Module, number: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Name in the base -> parameter, of one adapter of several or of all of them."""
    for module in _routed(model):
        for one in range(len(module.routing.names)) if number is None else (number,):
            yield from ((f"{module.path}.{name}", parameter) for name, parameter in module.copies(one).items())


def shapes_of_copies(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the base -> shape, whatever an engine made of the parameter."""
    return {f"{module.path}.{name}": shape for module in _routed(model) for name, shape in module.places.items()}


def _kept(parameter: nn.Parameter) -> Tensor:
    """A copy: of what is on one device where it is, of what ZeRO-3 has partitioned in full, on the CPU."""
    return sharded.full(parameter) if hasattr(parameter, "ds_id") else parameter.detach().clone()


def refuse_both(targets: Mapping[str, nn.Module], chosen: Mapping[str, nn.Parameter]) -> None:
    """Raises AdapterError for a layer that would get an update and be trained in full."""
    for path in targets:
        if any(name.startswith(f"{path}.") for name in chosen):
            raise AdapterError(f"targets: {path} is also in modules_to_save; remove it from one of them")
