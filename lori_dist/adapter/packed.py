"""Several adapters on one model, each met by its own rows of a batch.

What a loop over adapters would do are batched products here: over groups of rows that belong to one adapter each.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lori_dist.adapter import sharded
from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec
from lori_dist.adapter.attach import (
    ATTACHED,
    adapted,
    checked_projection,
    match,
    positions,
    put,
    refuse_adapted,
    refuse_other_modules,
    trained_on,
)
from lori_dist.adapter.experts import Expert
from lori_dist.adapter.linear import AdaptedLinear, features, shaped
from lori_dist.adapter.projection import Recipe, checksum
from lori_dist.errors import AdapterError
from lori_dist.plugin import nearest


@dataclass(kw_only=True, slots=True)
class Routing:
    """Which adapter each row of the batch that runs belongs to, and what came of it in the backward pass."""

    names: tuple[str, ...]
    """Of the adapters."""
    collects: bool = False
    """Whether the backward pass adds gradients to `sums`, and gives parameters none, so that no engine reduces them."""
    groups: tuple[int, ...] = ()
    """The adapter of each of as many equal groups, into which the batch's rows are divided in their order. -1: none."""
    num_rows: int = 0
    num_tokens: int | None = None
    """Of the batch, padding included, where all layers see as many."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """`name_of(module, adapter)` -> (1, kept): gradients of the step, summed, of this process."""

    def begin(self, of_rows: Sequence[int], length: int | None = None) -> None:
        """A batch is to run. of_rows: number of each row's adapter. length: tokens of a row.

        Equal runs of rows are one group each: as many rows of each adapter, one adapter after the other, are fastest.
        """
        starts = [place for place, one in enumerate(of_rows) if place == 0 or one != of_rows[place - 1]]
        lengths = {end - start for start, end in zip(starts, [*starts[1:], len(of_rows)], strict=True)}
        self.groups = tuple(of_rows[start] for start in starts) if len(lengths) == 1 else tuple(of_rows)
        self.num_rows = len(of_rows)
        self.num_tokens = None if length is None else len(of_rows) * length

    @contextlib.contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of what the model is given meets adapters[i]; None: the base alone.

        Raises AdapterError for a name that no adapter has.
        """
        numbers: dict[str | None, int] = {None: -1}
        numbers |= {name: number for number, name in enumerate(self.names)}
        unknown = next((name for name in adapters if name not in numbers), None)
        if unknown is not None:
            known = ", ".join(self.names)
            raise AdapterError(
                f"rows: unknown adapter {unknown!r}; there are {known}.{nearest(str(unknown), self.names)}"
            )
        before = self.groups, self.num_rows, self.num_tokens
        self.begin([numbers[name] for name in adapters])
        try:
            yield
        finally:
            self.groups, self.num_rows, self.num_tokens = before

    def only(self, adapter: str | None) -> None:
        """From here on all rows meet one adapter, or the base alone, however many there are."""
        self.groups, self.num_rows, self.num_tokens = ((-1 if adapter is None else self.names.index(adapter)),), 0, None

    def split(self, module: str, x: Tensor) -> Tensor:
        """(groups, tokens of each, features). Raises AdapterError for a layer that does not see rows as they are."""
        num_tokens = x.numel() // x.shape[-1]
        is_known = len(self.groups) == 1 or x.shape[0] == self.num_rows or num_tokens == self.num_tokens
        if not self.groups or not is_known:
            found = f"an input of shape {tuple(x.shape)} for {self.num_rows} rows"
            raise AdapterError(f"{module}: has {found}, so they cannot be distinguished; remove it from the targets")
        return x.reshape(len(self.groups), -1, x.shape[-1])


def name_of(module: str, adapter: str) -> str:
    """Of the trained tensor of one adapter in one module."""
    return f"{module}@{adapter}"


def adapter_of(name: str) -> str:
    """The adapter of a trained tensor; nothing where there is one adapter only."""
    return name.partition("@")[2]


def module_of(name: str) -> str:
    return name.partition("@")[0]


class _Grouped(torch.autograd.Function):
    """y + scale * B_g (A_g x_g) for every group g, saving A x, which is rank wide, instead of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: "PackedDelta", *values: Tensor) -> Tensor:
        ctx.layer, ctx.groups, ctx.x_dtype, ctx.x_shape = layer, layer.routing.groups, x.dtype, x.shape
        a, b = layer.operands(ctx.groups, values, y.dtype)
        reduced = torch.bmm(layer.routing.split(layer.module, x).to(y.dtype), a.mT)
        ctx.save_for_backward(reduced, *values)
        grouped = torch.baddbmm(y.reshape(*reduced.shape[:2], -1), reduced, b.mT, alpha=layer.scale)
        return shaped(grouped, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reduced, *values = ctx.saved_tensors
        layer: PackedDelta = ctx.layer
        of_groups = grad.reshape(*reduced.shape[:2], -1)
        a, b = layer.operands(ctx.groups, values, grad.dtype)
        grads: tuple[Tensor | None, ...] = (None,) * len(values)
        if any(ctx.needs_input_grad[3:]):
            grad_b = torch.bmm(of_groups.mT, reduced)
            if layer.routing.collects:
                layer.add_gradients(ctx.groups, grad_b)
            else:
                grads = layer.gradients(ctx.groups, grad_b, values)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(torch.bmm(of_groups, b).mul_(layer.scale), a).to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, *grads


class PackedDelta(nn.Module):
    """The updates of several adapters for one module: adds to each group of rows that of its own.

    A parameter, or a buffer where nothing is trained, for each adapter that keeps entries here: `values_0`, ... Their A
    are one buffer; adapters of smaller rank have rows of zeros. Every parameter has a gradient after a backward pass,
    zero where the batch has no rows of its adapter, so that ranks reduce the same ones; or all gradients are added to
    the sums of the routing, if it `collects` them.
    """

    projections: Tensor  # (adapters, rank, in_features)
    positions: Tensor | None  # int32, of all kept entries in the flat (adapters, out_features, rank); None: all

    def __init__(
        self,
        *,
        module: str,
        projections: Tensor,
        indices: Sequence[Tensor | None],  # of each adapter, into the flat (out_features, rank); None: all entries
        values: Sequence[Tensor | None],  # of each adapter; None: it keeps nothing
        out_features: int,
        scale: float,
        routing: Routing,
        recipes: Sequence[Recipe] = (),
        is_trained: bool,
    ) -> None:
        super().__init__()
        self.module, self.scale, self.routing, self.recipes = module, scale, routing, tuple(recipes)
        self.rank, self.in_features, self.out_features = projections.shape[1], projections.shape[2], out_features
        self.register_buffer("projections", projections, persistent=False)
        size = out_features * self.rank
        self.kept = [size if index is None else index.numel() for index in indices]
        self.register_buffer("positions", _positions(indices, size), persistent=False)
        for number, of_one in enumerate(values):
            if of_one is not None and is_trained:
                self.register_parameter(f"values_{number}", nn.Parameter(of_one))
            else:
                self.register_buffer(f"values_{number}", of_one, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kept = [values for values in self._values() if values is not None]
        if not kept:
            return y
        return cast(Tensor, _Grouped.apply(x, y, self, *kept))  # type: ignore[no-untyped-call]

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.forward(x, base(x))

    @property
    def is_empty(self) -> bool:
        """Whether all updates are zero, and stay so."""
        return not self.holders()

    def holders(self) -> list[int]:
        """The adapters that keep entries here."""
        return [number for number, values in enumerate(self._values()) if values is not None]

    def trainable(self, path: str, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """`name_of(path, adapter)` -> the entries being trained, of all adapters or of one."""
        return {name_of(path, name): p for name, p in self.trained().items() if adapter in (None, name)}

    def restrict(self, indices: Sequence[Tensor | None]) -> None:
        """Keeps only these entries of each adapter's B from here on, from zero. The parameters are new ones.

        indices: of each adapter, ascending flat positions in (out_features, rank), int32; None for all.
        """
        size, device = self.out_features * self.rank, self.projections.device
        self.kept = [size if index is None else index.numel() for index in indices]
        self.positions = _positions([None if index is None else index.to(device) for index in indices], size)
        for number, kept in enumerate(self.kept):
            name = f"values_{number}"
            delattr(self, name)
            made = nn.Parameter(torch.zeros(kept, device=device)) if kept else None
            self.register_parameter(name, made)

    def trained(self) -> dict[str, nn.Parameter]:
        """Adapter -> the entries that are trained."""
        found = {name: getattr(self, f"values_{number}") for number, name in enumerate(self.routing.names)}
        return {name: values for name, values in found.items() if isinstance(values, nn.Parameter)}

    def index(self, number: int) -> Tensor | None:
        """Of one adapter, (kept,), int32, ascending positions in the flat (out_features, rank); None: all."""
        size = self.out_features * self.rank
        if self.positions is None or self.kept[number] == size:
            return None
        return self._of(self.positions, number) - number * size

    def index_of(self, adapter: str | None) -> Tensor | None:
        """As `index`, by name."""
        return self.index(self.routing.names.index(str(adapter)))

    def _of(self, positions: Tensor, number: int) -> Tensor:
        start = sum(self.kept[:number])
        return positions[start : start + self.kept[number]]

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, f"values_{number}") for number in range(len(self.routing.names))]

    def operands(self, groups: tuple[int, ...], values: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, (groups, rank, in_features), and B, (groups, out_features, rank). values: of the holders."""
        of_adapters = dict(zip(self.holders(), values, strict=True))
        needed = tuple(dict.fromkeys(groups))  # each B is made once, however many groups have it
        b = self._dense(needed, of_adapters, dtype)
        a = self.projections
        if needed != tuple(range(len(self.routing.names))):
            a = self.projections[torch.tensor([max(number, 0) for number in needed], device=a.device)]
        if needed != groups:
            which = torch.tensor([needed.index(number) for number in groups], device=a.device)
            a, b = a[which], b[which]
        return a.to(dtype), b

    def _dense(self, needed: tuple[int, ...], values: Mapping[int, Tensor], dtype: torch.dtype) -> Tensor:
        shape = (len(needed), self.out_features, self.rank)
        held = [values[number].to(dtype) for number in needed if number in values]
        index = self._index(needed)
        device = self.projections.device
        if index is None and len(held) == len(needed):
            return torch.cat(held).view(shape)
        flat = torch.zeros(shape, dtype=dtype, device=device).view(-1)
        if not held:
            return flat.view(shape)
        assert index is not None
        return flat.index_add_(0, index, torch.cat(held)).view(shape)

    def _index(self, needed: tuple[int, ...]) -> Tensor | None:
        """Where the entries of these adapters are, one B after the other. None: everywhere."""
        positions, size = self.positions, self.out_features * self.rank
        if positions is None or needed == tuple(range(len(self.kept))):
            if positions is not None or -1 not in needed:
                return positions
            everywhere = torch.arange(size, dtype=torch.int32, device=self.projections.device)
            places = [everywhere + place * size for place, number in enumerate(needed) if number >= 0]
        else:
            placed = [(place, number) for place, number in enumerate(needed) if number >= 0]
            places = [self._of(positions, number) + (place - number) * size for place, number in placed]
        nothing = torch.empty(0, dtype=torch.int32, device=self.projections.device)
        return torch.cat([nothing, *places])

    def add_gradients(self, groups: tuple[int, ...], grad_b: Tensor) -> None:
        """Adds each adapter's gradient to the sums. grad_b: (groups, out_features, rank), each adapter's once."""
        index = self._index(groups)
        flat = grad_b.reshape(-1)
        holders = set(self.holders())
        held = [number for number in groups if number in holders]
        picked = flat if index is None else flat.index_select(0, index)
        sizes = [self.kept[number] for number in held]
        names = [name_of(self.module, self.routing.names[number]) for number in held]
        into = [self._sum(name, size, flat.device) for name, size in zip(names, sizes, strict=True)]
        torch._foreach_add_(into, [part.float() for part in torch.split(picked, sizes)], alpha=self.scale)

    def gradients(self, groups: tuple[int, ...], grad_b: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each holder's gradient, (kept,). grad_b: (groups, out_features, rank). values: of the holders."""
        found = []
        for number, of_one in zip(self.holders(), values, strict=True):
            index = self.index(number)
            flat = torch.zeros_like(of_one)
            for group, other in enumerate(groups):
                if other == number:
                    of_group = grad_b[group].view(-1)
                    picked = of_group if index is None else of_group.index_select(0, index)
                    flat.add_(picked, alpha=self.scale)
            found.append(flat)
        return tuple(found)

    def _sum(self, name: str, size: int, device: torch.device) -> Tensor:
        if name not in self.routing.sums:
            self.routing.sums[name] = torch.zeros(1, size, device=device)
        return self.routing.sums[name][0]

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedDelta":
        """As a `Delta`: never to another A, index or less exact values, and real again after a trip to meta."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor is self.projections:
                if tensor.is_meta and not result.is_meta:
                    return torch.stack([recipe.make(device=result.device) for recipe in self.recipes])
                return tensor.to(result.device)
            if tensor is self.positions:
                return tensor if result.is_meta else tensor.to(result.device)
            if tensor.is_meta and not result.is_meta:
                return torch.zeros_like(tensor, device=result.device)
            return cast(Tensor, result if result.dtype.itemsize >= 4 else tensor.to(result.device))

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def _positions(indices: Sequence[Tensor | None], size: int) -> Tensor | None:
    if all(index is None for index in indices):
        return None
    device = next(index.device for index in indices if index is not None)
    everywhere = torch.arange(size, dtype=torch.int32, device=device)
    return torch.cat(
        [(everywhere if index is None else index) + number * size for number, index in enumerate(indices)]
    ).to(torch.int32)


def packed(model: nn.Module) -> dict[str, PackedDelta]:
    """Module path -> its updates, of a model that has several adapters."""
    suffix = ".deltas.0"
    return {
        path.removesuffix(suffix): module for path, module in model.named_modules() if isinstance(module, PackedDelta)
    }


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`name_of(module, adapter)` and the entries that are trained, adapter by adapter, in the model's order."""
    layers = packed(model)
    for name in next(iter(layers.values())).routing.names if layers else ():
        for path, delta in layers.items():
            if name in delta.trained():
                yield name_of(path, name), delta.trained()[name]


# --- on a model ------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module, specs: Mapping[str, Spec], masks: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Routing:
    """Puts an adapter to train for each name on a model, in place, whose base is frozen.

    specs: by name; they differ in nothing but their seeds. masks: name -> module path -> (out_features, rank) bool;
    without masks all entries of B exist. Returns the routing, which collects the gradients, and whose `begin` is called
    before each batch.
    Raises AdapterError as `attach.attach`, and for specs that differ in more.
    """
    return _attach(model, specs, masks, Routing(names=tuple(specs), collects=True))


def _attach(
    model: nn.Module, specs: Mapping[str, Spec], masks: Mapping[str, Mapping[str, Tensor]] | None, routing: Routing
) -> Routing:
    refuse_adapted(model)
    first = next(iter(specs.values()))
    for name, spec in specs.items():
        if dataclasses.replace(spec, seed=first.seed) != first or spec.projection != "cached":
            raise AdapterError(
                f"{name}: adapters over one base may differ in their seeds only, with a cached A; got {spec}"
            )
    bases = match(model, first.targets, exclude=first.exclude)
    _refuse_unroutable(bases, saves=bool(first.modules_to_save))
    model.requires_grad_(False)
    put(model, {path: _adapted(base, _to_train(path, base, specs, masks, routing)) for path, base in bases.items()})
    setattr(model, ATTACHED, dict(specs))
    return routing


def _refuse_unroutable(bases: Mapping[str, nn.Module], *, saves: bool) -> None:
    if problem := _unroutable(bases, saves=saves):
        raise AdapterError(problem)


def _unroutable(bases: Mapping[str, nn.Module], *, saves: bool) -> str | None:
    """Why rows cannot be distinguished; None: they can."""
    if saves:
        return "modules_to_save: what is trained in full cannot be distinguished by rows; attach one at a time"
    expert = next((path for path, base in bases.items() if isinstance(base, Expert)), None)
    if expert is None:
        return None
    remedy = "attach one adapter at a time, in a run by cluster.packing: off"
    return f"{expert}: experts see tokens without their rows; {remedy}"


def is_routable(model: nn.Module, adapters: Mapping[str, Adapter]) -> bool:
    """Whether `attach_several` takes them: experts, and what was trained in full, do not know the rows."""
    return _unroutable(_bases(model, adapters), saves=_save(adapters)) is None


def _bases(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, nn.Module]:
    return {path: base for adapter in adapters.values() for path, base in trained_on(model, adapter).items()}


def _save(adapters: Mapping[str, Adapter]) -> bool:
    return any(adapter.saved for adapter in adapters.values())


def _adapted(base: nn.Module, delta: PackedDelta) -> AdaptedLinear:
    return AdaptedLinear(base, [delta])  # type: ignore[list-item]


def _to_train(
    path: str,
    base: nn.Module,
    specs: Mapping[str, Spec],
    masks: Mapping[str, Mapping[str, Tensor]] | None,
    routing: Routing,
) -> PackedDelta:
    out_features, in_features = features(base)
    device = base.get_parameter("weight").device
    spec = next(iter(specs.values()))
    recipes = [
        Recipe(seed=one.seed, module=path, rank=one.rank, in_features=in_features, dtype=one.dtype)
        for one in specs.values()
    ]
    shape = out_features, spec.rank
    indices = [None if masks is None else _index_of(name, path, masks[name], shape, device) for name in specs]
    sizes = [out_features * spec.rank if index is None else index.numel() for index in indices]
    return PackedDelta(
        module=path,
        projections=torch.stack([recipe.make(device=device) for recipe in recipes]),
        indices=indices,
        values=[torch.zeros(size, device=device) if size else None for size in sizes],
        out_features=out_features,
        scale=spec.scale,
        routing=routing,
        recipes=recipes,
        is_trained=True,
    )


def _index_of(
    name: str, path: str, masks: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    try:
        index = positions(path, masks, shape)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error
    return index if index is None or device.type == "meta" else index.to(device)


def sparsify(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """As `attach.sparsify`, of all adapters of a model. masks: name -> module path -> (out_features, rank) bool."""
    layers, names = packed(model), tuple(getattr(model, ATTACHED))
    if masks.keys() != set(names):
        raise AdapterError(
            f"masks: got masks for {', '.join(masks) or 'nothing'}; the model has adapters {', '.join(names)}, all of "
            "which get one"
        )
    for name, of_one in masks.items():
        refuse_other_modules(of_one, adapted(model), f"{name}: ")
    cpu = torch.device("cpu")
    indices = {
        path: [_index_of(name, path, masks[name], (delta.out_features, delta.rank), cpu) for name in names]
        for path, delta in layers.items()
    }
    sharded.reshard(model)
    places = sharded.forget(model, [*layers.values()])
    for path, delta in layers.items():
        delta.restrict(indices[path])
    if sharded.is_fully_sharded(model):
        sharded.join(model, [*layers.items()], places)


def attach_several(
    model: nn.Module,
    adapters: Mapping[str, Adapter | Spec],
    *,
    masks: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Routing:
    """Puts several adapters on a model, in place, each under a name. `rows` of what this returns says which row of a
    batch meets which; before the first time, all meet the first.

    With Adapters: trained ones, frozen, for inference. They may have been trained on other targets, with other ranks,
    and be merges. The model may be one that `fully_shard` was applied to: every rank then has all of the adapters, and
    its own rows.
    With Specs: adapters to train together over one frozen base, which differ in their seeds only. `trainable`, `dense`,
    `extract` and `sparsify` take such a model, and name the adapter. Each parameter's gradient is that of its own
    adapter's rows, so each is trained as it would be alone. The model may be one that `fully_shard` was applied to;
    for DDP and DeepSpeed call this first. masks: name -> module path -> (out_features, rank) bool, the entries of B
    that exist; without masks, all do.
    Raises AdapterError as `attach.attach`, for Specs beside Adapters, and for masks of Adapters.
    """
    if not adapters:
        raise AdapterError("adapters: there are none; give at least one Adapter or Spec, by name")
    specs = {name: one for name, one in adapters.items() if isinstance(one, Spec)}
    trained = {name: one for name, one in adapters.items() if isinstance(one, Adapter)}
    wrong = next((name for name in adapters if name not in specs and name not in trained), None)
    if wrong is not None:
        raise AdapterError(f"{wrong}: got a {type(adapters[wrong]).__name__}; wanted an Adapter or a Spec")
    if specs and trained:
        raise AdapterError(
            f"{next(iter(specs))}: is a Spec, and {next(iter(trained))} a trained Adapter; attach Specs to train, or "
            "Adapters for inference"
        )
    return _attach_specs(model, specs, masks) if specs else _attach_trained(model, trained, masks)


def _attach_specs(
    model: nn.Module, specs: Mapping[str, Spec], masks: Mapping[str, Mapping[str, Tensor]] | None
) -> Routing:
    if masks is not None and masks.keys() != specs.keys():
        raise AdapterError(
            f"masks: got masks for {', '.join(masks) or 'nothing'}; wanted them for {', '.join(specs)}, or none at all"
        )
    sharded.refuse_late(model)
    sharded.reshard(model)
    routing = _attach(model, specs, masks, Routing(names=tuple(specs)))
    if sharded.is_fully_sharded(model):
        sharded.join(model, [*packed(model).items()])
    routing.only(routing.names[0])
    return routing


def _attach_trained(
    model: nn.Module, adapters: Mapping[str, Adapter], masks: Mapping[str, Mapping[str, Tensor]] | None
) -> Routing:
    if masks is not None:
        raise AdapterError("masks: got masks for trained adapters, which have their own; remove them")
    model = sharded.unwrapped(model)
    sharded.refuse_split(model)
    refuse_adapted(model)
    routing = Routing(names=tuple(adapters))
    bases = _bases(model, adapters)
    _refuse_unroutable(bases, saves=_save(adapters))
    model.requires_grad_(False)
    deltas = {path: _frozen(path, base, adapters, routing) for path, base in bases.items()}
    put(model, {path: _adapted(bases[path], delta) for path, delta in deltas.items()})
    sharded.place(model, [*deltas.items()])
    setattr(model, ATTACHED, dict(adapters))
    routing.only(routing.names[0])
    return routing


def _frozen(path: str, base: nn.Module, adapters: Mapping[str, Adapter], routing: Routing) -> PackedDelta:
    """Blocks of an adapter side by side, their scales in the values."""
    out_features, in_features = features(base)
    device = base.get_parameter("weight").device
    ranks = [_rank(adapter, path) for adapter in adapters.values()]
    dtypes = [block.dtype for adapter in adapters.values() for block in adapter.blocks]
    dtype = functools.reduce(torch.promote_types, dtypes)
    projections = torch.zeros(len(adapters), max(1, *ranks), in_features, dtype=dtype, device=device)
    indices, values = [], []
    for number, adapter in enumerate(adapters.values()):
        b, start = torch.zeros(out_features, projections.shape[1]), 0
        for block in adapter.blocks:
            if path in block.entries:
                end = start + block.rank_of(path)
                projections[number, start:end] = checked_projection(block, path, in_features, device)
                b[:, start:end] = block.entries[path].dense(out_features, end - start).float() * block.scale
                start = end
        index = b.flatten().nonzero().squeeze(1).to(device, torch.int32)
        indices.append(index)
        values.append(b.flatten()[index.long().cpu()].to(device) if index.numel() else None)
    return PackedDelta(
        module=path,
        projections=projections,
        indices=indices,
        values=values,
        out_features=out_features,
        scale=1.0,
        routing=routing,
        is_trained=False,
    )


def _rank(adapter: Adapter, path: str) -> int:
    return sum(block.rank_of(path) for block in adapter.blocks if path in block.entries)


def extract(
    model: nn.Module, name: str, values: Mapping[str, Tensor] | None = None, *, base: Mapping[str, Any] | None = None
) -> Adapter:
    """One of the adapters that a model trains.

    values: module path -> (kept,), on the CPU, which are not copied; without them a collective where the model is
    sharded, which takes those that the model holds.
    """
    spec: Spec = getattr(model, ATTACHED)[name]
    if values is None:
        held = {path: delta.trained().get(name) for path, delta in packed(model).items()}
        values = {path: sharded.full(tensor) for path, tensor in held.items() if tensor is not None}
    layers = packed(model)
    number = next(iter(layers.values())).routing.names.index(name)
    indices = {path: delta.index(number) for path, delta in layers.items()}
    block = Block(
        name=name,
        seed=spec.seed,
        rank=spec.rank,
        alpha=spec.alpha,
        dtype=spec.dtype,
        entries={
            path: Entries(index=None if (index := indices[path]) is None else index.cpu(), values=of_module)
            for path, of_module in values.items()
        },
        checksums={path: checksum(delta.projections[number]) for path, delta in layers.items()},
    )
    shapes = {path: features(layer.base) for path, layer in adapted(model).items()}
    return Adapter(shapes=shapes, blocks=(block,), targets=spec.targets, base=dict(base or {}))
