"""Modules that are trained in full, such as the head of a classifier, and stored with the adapter."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lori_dist.adapter import sharded
from lori_dist.adapter.linear import shaped
from lori_dist.adapter.routing import NOBODY, Routing, name_of
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
        found = {
            f"{path}.{name}": parameter
            for path in _paths(model, wanted)
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


def _paths(model: nn.Module, wanted: str) -> list[str]:
    paths = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{wanted}")]
    if not paths:
        known = {path.rpartition(".")[2] for path, module in model.named_modules() if [*module.parameters()]}
        raise AdapterError(f"modules_to_save: {wanted!r} is not a module.{nearest(wanted, known - {''})}")
    return paths


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
                "base model it was trained on, in the same class and with a head of that size, or attach_several, "
                "which gives each adapter its own"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """What one of several adapters has at the place of a module of the base."""

    module: nn.Module
    """What it computes. Its parameters are not used."""
    values: Mapping[str, Tensor] | None = None
    """Name in the module -> initial value; None: those of the base's module, which it is a copy of."""


Owned = Sequence[Own | None]
"""What each adapter has at the place of a module; None: the base's."""


class RoutedModule(nn.Module):
    """A module that is trained in full, of which every adapter has a copy or a module of its own that its rows meet.

    Its parameters are called `copy_0_0`, ...: adapter and place in the module. Where the modules give different numbers
    of features, as heads of different numbers of labels do, every row gets as many as the largest gives, the base's
    included, so that outputs have one shape; the features that a row has too many of are the least number of the dtype,
    to which a softmax gives 0.
    """

    base: nn.Module | None
    """The base's module, for rows of adapters that have none of their own, where it is kept."""

    def __init__(self, path: str, base: nn.Module, owned: Owned, routing: Routing) -> None:
        super().__init__()
        self.path, self.routing, self.base = path, routing, None
        device = next((one.device for one in base.parameters()), None)
        forms, places = list[nn.Module | None](), list[dict[str, tuple[int, ...]]]()
        self.starts: dict[int, Mapping[str, Tensor]] = {}  # of copies of the base's module, this is it
        for number, own in enumerate(owned):
            forms.append(None if own is None else _form(path, own.module, own.values or {}))
            places.append({})
            if own is None:
                continue
            if own.values is not None:
                self.starts[number] = own.values
            for place, (name, parameter) in enumerate(own.module.named_parameters()):
                value = _copied(parameter) if own.values is None else own.values[name].to(device, copy=True)
                places[-1][name] = tuple(value.shape)
                self.register_parameter(f"copy_{number}_{place}", nn.Parameter(value))
        self.forms, self.places = tuple(forms), tuple(places)  # in a tuple, so that forms are no submodules
        # Copies give as many features as the base's module.
        self.sized: tuple[nn.Module, ...] = ()
        if self.starts:
            self.sized = (
                _form(path, base, {}),
                *(form for number, form in enumerate(forms) if form is not None and number in self.starts),
            )
        self.width: int | None = None
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The first copy's, for code that looks at its dtype or size."""
        return self.copies(next(number for number, places in enumerate(self.places) if places))["weight"]

    def copies(self, number: int) -> dict[str, nn.Parameter]:
        """Name in the module -> the parameter of one adapter."""
        return {name: getattr(self, f"copy_{number}_{place}") for place, name in enumerate(self.places[number])}

    def train(self, mode: bool = True) -> Self:
        for form in self.forms:
            if form is not None:
                form.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def begin_again(self) -> None:
        """Gives the copies the values that they had. A collective where they are sharded."""
        of_base = {} if self.base is None else dict(self.base.named_parameters())
        for number in range(len(self.places)):
            for name, parameter in self.copies(number).items():
                start = self.starts[number][name] if number in self.starts else sharded.full(of_base[name])
                sharded.put(parameter, start)

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        if more or options:
            raise AdapterError(
                f"modules_to_save: {self.path} is called with more than one tensor, so the rows of several adapters "
                "cannot be kept apart; train them one at a time (cluster.packing: off)"
            )
        segments = self.routing.segments(self.path, x if x.is_floating_point() else x[..., None])
        num_tokens, made, shape = segments[-1].tokens.stop, list[Tensor](), x.shape
        factor = max(1, num_tokens // max(1, len(x)))
        if any(segment.tokens.start % factor for segment in segments):  # tasks meet within a row
            x, factor = x.reshape(num_tokens, 1, *x.shape[2:]), 1
        held, trained = self._held()
        for segment in segments:
            rows = slice(segment.tokens.start // factor, segment.tokens.stop // factor)
            if len(segments) == 1:
                rows = slice(None)
            made.append(self._of(segment.adapter, x[rows], held))
        done = torch.cat([*self._filled_up(x, made)])
        if trained and not any(segment.adapter in trained for segment in segments):
            done = cast(Callable[..., Tensor], _WithZeros.apply)(done, *self.parameters(recurse=False))
        return done if x.shape == shape else shaped(done, (*shape[:2], *done.shape[2:]))

    def _held(self) -> tuple[dict[int, dict[str, Tensor]], set[int]]:
        """Number of an adapter -> its copies, and the adapters whose copies get a gradient in this pass."""
        held: dict[int, dict[str, Tensor]] = {number: {**self.copies(number)} for number in range(len(self.places))}
        everything = [one for copies in held.values() for one in copies.values()]
        if self.routing.collects or not torch.is_grad_enabled() or not any(one.requires_grad for one in everything):
            return held, set()
        aliases = iter(cast(Callable[..., tuple[Tensor, ...]], _InOrder.apply)(*everything))
        own = {number: {name: next(aliases) for name in copies} for number, copies in held.items()}
        return own, {number for number, copies in own.items() if copies}

    def _of(self, number: int, x: Tensor, held: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """What an adapter's rows become."""
        form = None if number == NOBODY else self.forms[number]
        if form is None:
            assert self.base is not None
            return cast(Tensor, self.base(x))
        named = held[number]
        if self.routing.collects:
            apply = cast(Callable[..., Tensor], _ToSums.apply)
            named = {name: apply(one, self.routing, self._name(name, number)) for name, one in named.items()}
        return cast(Tensor, torch.func.functional_call(form, dict(named), (x,)))

    def _filled_up(self, x: Tensor, made: Sequence[Tensor]) -> Sequence[Tensor]:
        """What rows became, with as many features as the largest module gives."""
        if not self.sized:
            return made
        if self.width is None:
            self.width = max(_width(form, x) for form in self.sized)
        missing = [self.width - one.shape[-1] for one in made]
        return [
            nn.functional.pad(one, (0, more), value=torch.finfo(one.dtype).min) if more else one
            for one, more in zip(made, missing, strict=True)
        ]

    def _name(self, name: str, number: int) -> str:
        return name_of(key(f"{self.path}.{name}"), self.routing.names[number])


def _form(path: str, module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module on the meta device: what a module of the same kind computes with parameters that it is given, those that
    have these values or the module's own."""
    if buffer := next((name for name, _ in module.named_buffers()), None):
        raise AdapterError(
            f"modules_to_save: {path} has a buffer ({buffer}), which cannot be kept apart for several adapters "
            "over one base; train them one at a time (cluster.packing: off)"
        )
    if any(hasattr(one, "_get_fsdp_state") for one in module.modules()):
        raise AdapterError(
            f"modules_to_save: fully_shard was applied to {path} itself, of which several adapters get copies; call "
            "attach_several first, or leave it to the module around it"
        )
    empty = dict[int, Any]()
    for name, one in module.named_parameters():
        shape = tuple(values[name].shape) if name in values else sharded.shape(one)
        empty[id(one)] = nn.Parameter(torch.empty(shape, dtype=one.dtype, device="meta"), requires_grad=False)
    return copy.deepcopy(module, empty)


def _width(form: nn.Module, x: Tensor) -> int:
    """Features that a module gives of such an input."""
    dtype = next(one.dtype for one in form.parameters()) if x.is_floating_point() else x.dtype
    return int(form(torch.empty(x.shape, dtype=dtype, device="meta")).shape[-1])


def _copied(parameter: nn.Parameter) -> Tensor:
    """All of a parameter's values, where it is."""
    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
        return sharded.full(parameter).to(parameter.device)
    return parameter.detach().clone()


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


class _InOrder(torch.autograd.Function):
    """Parameters, whose gradients come together and in this order, zero where no row has met one: engines reduce all of
    them, as they come, and ranks have rows of different adapters."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.detach() for one in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _WithZeros(torch.autograd.Function):
    """A tensor, and parameters that it does not depend on, whose gradients are zero, as those of `_InOrder`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(one.shape, one.dtype) for one in parameters]
        return shaped(tensor, tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like)


def owned(
    model: nn.Module, wanted: Sequence[Sequence[str]], given: Sequence[Mapping[str, nn.Module]]
) -> dict[str, Owned]:
    """Path -> what each adapter that is to be trained has there.

    wanted: of each adapter its modules_to_save. given: of each, name among these -> a module of its own, whose values
    are where it begins; others begin as copies of the model's. Raises AdapterError as `match`, and for modules within
    others.
    """
    found: dict[str, list[Own | None]] = {}
    for number, (modules, own) in enumerate(zip(wanted, given, strict=True)):
        match(model, [name for name in modules if name not in own])
        for name in modules:
            for path in _paths(model, name):
                one = Own(module=model.get_submodule(path))
                if name in own:
                    one = Own(module=own[name], values=_values(path, own[name]))
                found.setdefault(path, [None] * len(wanted))[number] = one
    return _separate(found)


def _separate(found: Mapping[str, Sequence[Own | None]]) -> dict[str, Owned]:
    """Raises AdapterError for modules within others."""
    for path in found:
        inner = next((other for other in found if other.startswith(f"{path}.")), None)
        if inner is not None:
            raise AdapterError(
                f"modules_to_save: {inner} is within {path}, which another adapter has; name the same one for all"
            )
    return {path: tuple(of_adapters) for path, of_adapters in found.items()}


def _values(path: str, module: nn.Module) -> dict[str, Tensor]:
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    wrong = next((name for name, one in values.items() if one.dtype != torch.float32 or one.is_meta), None)
    if not values:
        raise AdapterError(f"heads: the {type(module).__name__} that was given for {path} has no parameter")
    if wrong is not None:
        one = values[wrong]
        found = "on the meta device, without values" if one.is_meta else str(one.dtype)
        raise AdapterError(f"heads: {wrong} of what was given for {path} is {found}; give a module in float32")
    return values


def owned_by_trained(
    model: nn.Module, tensors: Sequence[Mapping[str, Tensor]], given: Sequence[Mapping[str, nn.Module]]
) -> dict[str, Owned]:
    """Path -> what each trained adapter has there.

    tensors: of each adapter, name of a parameter -> its values; only the first axis may be of another size than the
    model's. given: of each, path -> a module of another kind that the adapter was trained with. Raises AdapterError for
    a model that has no such parameters.
    """
    found: dict[str, list[Own | None]] = {}
    for number, (of_one, own) in enumerate(zip(tensors, given, strict=True)):
        modules = {path: _with(path, module, of_one) for name, module in own.items() for path in _paths(model, name)}
        inside = tuple(f"{path}." for path in modules)
        for name in of_one:
            if not name.startswith(inside):
                path = name.rpartition(".")[0]
                modules.setdefault(path, _like(model, path, of_one))
        for path, one in modules.items():
            found.setdefault(path, [None] * len(tensors))[number] = one
    return _separate(found)


def _with(path: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Own:
    """A module that is given, with the values of an adapter."""
    places = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    there = {name: tuple(tensors[f"{path}.{name}"].shape) for name in places if f"{path}.{name}" in tensors}
    if there != places:
        raise AdapterError(f"heads: what was given for {path} has {places}, and the adapter {there}; give its like")
    return Own(module=module, values={name: tensors[f"{path}.{name}"] for name in places})


def _like(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> Own:
    """The model's module with the values of an adapter, which may have another number of rows."""
    known = dict(model.named_modules())
    module = known.get(path)
    there = {} if module is None else dict(module.named_parameters())
    values = {}
    for name in [name for name in tensors if name.rpartition(".")[0] == path]:
        place, tensor = name.rpartition(".")[2], tensors[name]
        shape = sharded.shape(there[place]) if place in there else None
        first = int(isinstance(module, nn.Linear))  # of which a product may have any number of rows
        if shape is None or shape[first:] != tuple(tensor.shape)[first:]:
            found = f"one of {shape}" if shape is not None else "none of that name"
            raise AdapterError(
                f"{name}: the adapter has this parameter, of {tuple(tensor.shape)}, and the model {found}; use the "
                "base model it was trained on, in the same class, or give the module it was trained with (heads)"
            )
        values[place] = tensor.to(there[place].dtype)
    assert module is not None
    if values.keys() != there.keys():
        raise AdapterError(f"{path}: the adapter has {', '.join(values)} of it, and the model {', '.join(there)}")
    return Own(module=module, values=values)


def route(model: nn.Module, owned: Mapping[str, Owned], routing: Routing) -> dict[str, tuple[RoutedModule, nn.Module]]:
    """Puts a `RoutedModule` in place of modules of the base. Returns path -> it, and the module that was there."""
    bases = {path: model.get_submodule(path) for path in owned}
    made = {path: RoutedModule(path, bases[path], of_adapters, routing) for path, of_adapters in owned.items()}
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    return {path: (module, bases[path]) for path, module in made.items()}


def keep_bases(replaced: Mapping[str, tuple[RoutedModule, nn.Module]]) -> None:
    """Keeps the base's modules beside the adapters' own, for other rows and for the time after them."""
    for module, base in replaced.values():
        module.base = base.requires_grad_(False)


def routed(model: nn.Module) -> list[RoutedModule]:
    return [module for module in model.modules() if isinstance(module, RoutedModule)]


def trained(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Adapter, which one alone does not have, name in the base, and parameter of all that is trained in full."""
    found = [("", name, parameter) for name, parameter in parameters(model).items()]
    return found + [
        (adapter, f"{module.path}.{name}", parameter)
        for module in routed(model)
        for number, adapter in enumerate(module.routing.names)
        for name, parameter in module.copies(number).items()
    ]


def copies(model: nn.Module, number: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Name in the base -> parameter, of one adapter of several or of all of them."""
    for module in routed(model):
        for one in range(len(module.routing.names)) if number is None else (number,):
            yield from ((f"{module.path}.{name}", parameter) for name, parameter in module.copies(one).items())


def shapes_of_copies(model: nn.Module, number: int) -> dict[str, tuple[int, ...]]:
    """Name in the base -> shape of one adapter's, whatever an engine made of the parameter."""
    return {f"{module.path}.{name}": shape for module in routed(model) for name, shape in module.places[number].items()}


def _kept(parameter: nn.Parameter) -> Tensor:
    """A copy: of what is on one device where it is, of what ZeRO-3 has partitioned in full, on the CPU."""
    return sharded.full(parameter) if hasattr(parameter, "ds_id") else parameter.detach().clone()


def refuse_empty(model: nn.Module, paths: Collection[str]) -> None:
    """Raises AdapterError for modules to copy that have no values yet."""
    empty = next((path for path in paths if any(one.is_meta for one in model.get_submodule(path).parameters())), None)
    if empty is not None:
        raise AdapterError(f"modules_to_save: {empty} is on the meta device, without values; load the model first")


def names_in(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters()]


def refuse_unknown(heads: Collection[str], names: Sequence[str], kind: str) -> None:
    """Raises AdapterError for heads of an adapter or a task that there is not."""
    unknown = next((name for name in heads if name not in names), None)
    if unknown is not None:
        known = ", ".join(names)
        raise AdapterError(f"heads: unknown {kind} {unknown!r}; there are {known}.{nearest(unknown, names)}")


def refuse_both(targets: Mapping[str, nn.Module], chosen: Collection[str]) -> None:
    """Raises AdapterError for a layer that would get an update and be trained in full, as these parameters are."""
    for path in targets:
        if any(name.startswith(f"{path}.") for name in chosen):
            raise AdapterError(f"targets: {path} is also in modules_to_save; remove it from one of them")
