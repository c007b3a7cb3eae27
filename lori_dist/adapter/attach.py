"""Putting an adapter on a model, taking it off, and baking it in."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lori_dist.adapter import formed, per_task, row_tokens, saved, sharded, task_adapter, task_column
from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec, in_memory
from lori_dist.adapter.bases import dequantized, features, is_conv1d, is_quantized
from lori_dist.adapter.experts import AdaptedExperts, Expert
from lori_dist.adapter.linear import AdaptedLinear, BaseDelta, Delta, Kept
from lori_dist.adapter.matching import linear_layers, listing, match, refuse_unadaptable
from lori_dist.adapter.per_task import PerTask
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.routing import Routing, adapter_of, module_of, name_of
from lori_dist.adapter.task_adapter import TaskAdapter
from lori_dist.errors import AdapterError
from lori_dist.forms import declares
from lori_dist.plugin import nearest

ATTACHED = "lori_attached"
"""Attribute of an adapted model that holds what was attached to it."""


def attach(
    model: nn.Module,
    what: Spec | Adapter | TaskAdapter,
    *,
    masks: Mapping[str, Tensor] | None = None,
    before: Adapter | None = None,
    train: bool = False,
    heads: Mapping[str, Mapping[str, nn.Module]] | None = None,
) -> dict[str, AdaptedLinear]:
    """Puts an adapter on a model, in place. Returns module path -> the layer that replaced it, in the model's order.

    With a Spec: something to train. The whole base is frozen; every target gets the update scale * B A whose B starts
    at zero; its modules_to_save are trained as they are. masks: module path -> (out_features, rank) bool, the entries
    of B that exist; without masks, all do.
    before: what was trained on the same A earlier. It stays as it is, and what is trained is added to it.
    With an Adapter: its trained updates, frozen; A is regenerated and compared with its checksums. With train, its
    kept entries are trained further from their values, and A stays the one it was, also where it is stored. On the
    meta device, which is for training, both are left to who gives the model its memory: values are zero, A is
    not compared.
    With a TaskAdapter, that of another form than lori: the same, frozen; rows meet the update of their task.
    heads: with a form in which each task has an update of its own, task -> name of a module -> one that the task has
    instead, as `attach_several` takes them; then each task also has a copy of its own of what modules_to_save names.

    Raises AdapterError for a merge of several blocks that is to be trained, for targets that match nothing or are no
    linear layers, for shapes that differ, for a layer used in two places, and for a model that has an adapter already.

    The model may be one that `fully_shard` was applied to: what is attached is then sharded with the modules around it,
    and every rank calls this. One that is in DDP or in an engine of DeepSpeed is refused: attach first.
    """
    sharded.refuse_late(model)
    refuse_adapted(model)
    sharded.reshard(model)
    if isinstance(what, TaskAdapter) and train:
        raise AdapterError(f"train: an adapter of the form {what.form.name} cannot be trained further")
    if isinstance(what, Adapter | TaskAdapter):
        if masks is not None:
            raise AdapterError("masks: got masks for an adapter, which has its own; remove them")
        if before is not None:
            raise AdapterError("before: cannot be combined with an adapter; merge the two instead")
    if isinstance(what, Spec):
        named = dict.fromkeys(name for of_task in (heads or {}).values() for name in of_task)
        what = dataclasses.replace(what, modules_to_save=tuple(dict.fromkeys((*what.modules_to_save, *named))))
    layers = layers_for(model, what, masks=masks, before=before, train=train)
    routing, owned = _owned_by_tasks(model, what, layers, heads)
    whole = saved.match(model, what.modules_to_save) if isinstance(what, Spec) and heads is None else {}
    saved.refuse_both(layers, [*whole, *(f"{path}.{name}" for path in owned for name in saved.names_in(model, path))])
    if isinstance(what, Adapter | TaskAdapter):
        saved.put(model, {name: in_memory(one) for name, one in what.saved.items() if not adapter_of(name)})
    model.requires_grad_(False)
    routed = {} if routing is None else saved.route(model, owned, routing)
    for module, _ in routed.values():
        module.requires_grad_(isinstance(what, Spec))
    if isinstance(what, Spec):
        saved.train(model, whole)
    elif train:
        for parameter in saved.parameters(model).values():
            parameter.requires_grad_(True)
    put(model, layers)
    for layer in layers.values():
        for delta in layer.deltas:
            delta.requires_grad_(train or isinstance(what, Spec))
    if sharded.is_fully_sharded(model):
        sharded.join(model, [*_deltas(layers), *((path, module) for path, (module, _) in routed.items())])
    saved.keep_bases(routed)
    setattr(model, ATTACHED, what)
    for one in list(formed.formed(layers).values())[:1]:
        setattr(model, task_column.ROUTING, one.routing)
        if one.routing is not None:
            task_column.route_by_column(model, one.routing)
        setattr(model, formed.PENALTIES, one.penalties)
        if one.rows is not None:
            row_tokens.watch(model, one.rows)
    return layers


def _owned_by_tasks(
    model: nn.Module,
    what: Spec | Adapter | TaskAdapter,
    layers: Mapping[str, AdaptedLinear],
    heads: Mapping[str, Mapping[str, nn.Module]] | None,
) -> tuple[Routing | None, dict[str, saved.Owned]]:
    """What routes rows to tasks, and path -> what each task has there that is trained in full; None where tasks have
    nothing of that kind of their own."""
    if heads is None and not (isinstance(what, TaskAdapter) and any(map(adapter_of, what.saved))):
        return None, {}
    routing = next((one.routing for one in formed.formed(layers).values()), None)
    if routing is None:
        raise AdapterError(
            "heads: are of tasks, and what is attached has one update for all rows; use attach_several, or a form in "
            "which each task has an update of its own, such as task_lora"
        )
    saved.refuse_unknown(heads or {}, routing.names, "task")
    given = [(heads or {}).get(task, {}) for task in routing.names]
    if isinstance(what, TaskAdapter):
        tensors = [
            {module_of(name): in_memory(one) for name, one in what.saved.items() if adapter_of(name) == task}
            for task in routing.names
        ]
        return routing, saved.owned_by_trained(model, tensors, given)
    assert isinstance(what, Spec)
    owned = saved.owned(model, [what.modules_to_save] * len(given), given)
    saved.refuse_empty(model, owned)
    return routing, owned


def layers_for(
    model: nn.Module,
    what: Spec | Adapter | TaskAdapter,
    *,
    masks: Mapping[str, Tensor] | None = None,
    before: Adapter | None = None,
    train: bool = False,
) -> dict[str, AdaptedLinear]:
    """Module path -> the layer that is to replace it, in the model's order. The arguments are those of `attach`."""
    if isinstance(what, Spec):
        return _from_spec(model, what, masks, before)
    if isinstance(what, TaskAdapter):
        bases = trained_on(model, what)
        return {path: AdaptedLinear(bases[path], [one]) for path, one in task_adapter.deltas_of(bases, what, _device)}
    if train and (len(what.blocks) != 1 or what.blocks[0].weight != 1.0):
        raise AdapterError(
            f"train: the adapter is a merge of {len(what.blocks)} weighted components; train one of one task, or "
            "merge them into one with another method"
        )
    return _from_adapter(model, what, train)


def _deltas(layers: Mapping[str, AdaptedLinear]) -> list[tuple[str, BaseDelta]]:
    return [(path, delta) for path, layer in layers.items() for delta in layer.deltas]


def refuse_adapted(model: nn.Module) -> None:
    """Raises AdapterError for a model that has an adapter, on itself, on a part of it, or on a model that it is part
    of."""
    held = next(
        (path for path, module in model.named_modules() if isinstance(module, (AdaptedLinear, BaseDelta))), None
    )
    if held is not None or getattr(model, ATTACHED, None) is not None:
        raise AdapterError(
            f"{held or 'model'}: an adapter is attached already; detach it from the model it was attached to first, "
            "or merge the two adapters"
        )
    foreign = next((path for path, _ in model.named_modules() if "lora_A" in path.split(".")), None)
    if foreign is not None:
        raise AdapterError(f"{foreign}: is a LoRA adapter of PEFT; merge_and_unload() or unload() it first")


def detach(model: nn.Module) -> None:
    """Takes the adapter off: the base layers stand where they stood, and what was trained in full is as it was. Updates
    folded into them stay folded."""
    sharded.refuse_wrapped(model)
    model = sharded.unwrapped(model)
    layers = _attached(model)
    sharded.reshard(model)
    sharded.forget(model, [*(delta for _, delta in _deltas(layers)), *saved.routed(model)])
    saved.take_back(model)
    sharded.settle(model)
    for path, module in list(model.named_modules()):
        if (
            isinstance(module, AdaptedExperts)
            or (isinstance(module, AdaptedLinear) and not isinstance(module.base, Expert))
            or (isinstance(module, saved.RoutedModule) and module.base is not None)
        ):
            _set(model, path, cast(nn.Module, module.base))
    setattr(model, ATTACHED, None)
    setattr(model, task_column.ROUTING, None)
    if (hook := vars(model).pop(task_column.HOOK, None)) is not None:
        hook.remove()
    setattr(model, formed.PENALTIES, None)
    row_tokens.unwatch(model)


def put(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Replaces each base by its layer; of fused experts, the experts by all layers of theirs."""
    of_experts: dict[str, dict[tuple[str, int], AdaptedLinear]] = {}
    for path, layer in layers.items():
        if isinstance(layer.base, Expert):
            place = path.rsplit(".", 2)[0]
            of_experts.setdefault(place, {})[layer.base.projection, layer.base.number] = layer
        else:
            _set(model, path, layer)
    for path, matrices_of in of_experts.items():
        _set(model, path, AdaptedExperts(model.get_submodule(path), matrices_of, path))


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@torch.no_grad()
def fold(model: nn.Module, *, dequantize: bool = False) -> None:
    """Adds the updates to the base's weights, so that the model runs at the base's speed. `unfold` takes them out.

    dequantize: replaces each quantised layer by one of the model's dtype first, which stays, also after
    `detach`; without it, AdapterError is raised for these. Quantising the sum again would round most of an update away.
    """
    layers = _attached(model)
    _refuse_forms(layers, "fold")
    if dequantize:
        for layer in layers.values():
            if is_quantized(layer.base):
                layer.base = dequantized(cast(nn.Linear, layer.base), _dtype(model))
    _refuse_unfoldable(model, {path: layer.base for path, layer in layers.items()})
    for layer in layers.values():
        if layer.folded is None:
            layer.folded = tuple(_values(delta) for delta in layer.deltas)
            _add(layer, 1.0)


def foldable(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """Module path -> the linear layer that the adapter updates, in the model's order. The model may be on meta.

    Raises AdapterError as `attach` and `fold` for a model that does not fit, or a weight that cannot be changed alone.
    """
    bases = trained_on(model, adapter)
    _refuse_unfoldable(model, bases)
    return bases


def _refuse_forms(layers: Mapping[str, AdaptedLinear], function: str) -> None:
    if found := formed.formed(layers):
        name = next(iter(found.values())).choice.name
        raise AdapterError(
            f"{function}: the model trains the form {name}, of which each task may have an update of its own; extract "
            "it, split that, and attach the adapter of one task"
        )


@torch.no_grad()
def unfold(model: nn.Module) -> None:
    """Takes the updates that were folded out of the base's weights again, to the rounding of their dtype."""
    for layer in _attached(model).values():
        if layer.folded is not None:
            _add(layer, -1.0)
            layer.folded = None


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module path -> adapted layer, in the model's order, which is the canonical order of all per-module results."""
    model = sharded.unwrapped(model)
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def trainable(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """All parameters that are trained, for an optimizer: module path -> kept entries of B, (kept,). Modules that keep
    none are absent.

    `path:A` -> an A that is trained, flat; `path:tensor` -> a tensor of another form; `name:saved` -> a parameter of
    modules_to_save. Of a model that trains several adapters: `path@name` -> the same; adapter: those of one of them.
    What `fully_shard` has sharded is a DTensor, also after a forward pass that has left it gathered.
    """
    _check_named(model, adapter)
    sharded.reshard(model)
    updates = [
        (path, name, delta)
        for path, layer in adapted(model).items()
        for name, delta in _owned(layer)
        if adapter in (None, name)
    ]
    found = {name_of(path, name): delta.values for path, name, delta in updates if isinstance(delta, Delta)}
    found |= {
        name_of(per_task.of_tensor(path, tensor), name): parameter
        for path, name, delta in updates
        for tensor, parameter in delta.trained().items()
    }
    whole = saved.trained(sharded.unwrapped(model))
    found |= {name_of(saved.key(name), of): one for of, name, one in whole if adapter in (None, of)}
    return {name: one for name, one in found.items() if one is not None and one.requires_grad}


def _several(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that `attach_several` has put on a model; none of other models."""
    found = getattr(sharded.unwrapped(model), ATTACHED, None)
    return tuple(found) if isinstance(found, Mapping) else ()


def _check_named(model: nn.Module, adapter: str | None) -> None:
    if adapter is not None and adapter not in (names := _several(model)):
        known = f"there are {', '.join(names)}.{nearest(adapter, names)}" if names else "the model has one, unnamed"
        raise AdapterError(f"adapter: unknown adapter {adapter!r}; {known}")


def dense(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Module path -> B of a model being trained, (out_features, rank), fp32 on the CPU: what masks are chosen from.

    adapter: the name of one of several. A collective where the model is sharded: every rank calls it and gets all.
    Entries that are not kept are zero. Raises AdapterError for a name that no adapter has.
    """
    if adapter is None and (names := _several(model)):
        raise AdapterError(f"adapter: the model has {', '.join(names)}; name one of them")
    _refuse_forms(adapted(model), "dense")
    _check_named(model, adapter)
    sharded.reshard(model)
    return {
        path: Entries(index=_index(delta), values=sharded.full(delta.values)).dense(delta.out_features, delta.rank)
        for path, layer in adapted(model).items()
        for name, delta in _owned(layer)
        if isinstance(delta, Delta)
        and name == (adapter or "")
        and delta.values is not None
        and delta.values.requires_grad
    }


@torch.no_grad()
def sparsify(model: nn.Module, masks: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]) -> None:
    """Makes of an adapter that was trained dense (LoRI-D) the sparse one to train next (LoRI-S), in place.

    masks: module path -> (out_features, rank) bool, for every target, as the functions of lori_dist.masks give them
    for `dense(model)`. The kept entries begin at zero, on the same A; modules_to_save and heads begin as they were. The
    parameters are new, so the optimizer must be. The base stays where it is: with `fully_shard`, the new parameters
    take the place of the old in its groups; with DeepSpeed, call engine.destroy() before this and
    deepspeed.initialize after it.
    Of a model with several adapters, masks are those of all of them: name -> module path -> mask.
    Raises AdapterError for a model that has no dense adapter to train, for masks that do not fit, and for what DDP or
    DeepSpeed have made around a model, which has to be made again around the new parameters.
    """
    sharded.refuse_wrapped(model)
    model = sharded.unwrapped(model)
    layers, spec = _attached(model), getattr(model, ATTACHED)
    specs = [*spec.values()] if isinstance(spec, Mapping) else [spec]
    _refuse_forms(layers, "sparsify")
    updates = [
        (path, name, delta)
        for path, layer in layers.items()
        for name, delta in _owned(layer)
        if isinstance(delta, Delta)
    ]
    if not all(isinstance(one, Spec) for one in specs) or any(delta.index is not None for *_, delta in updates):
        raise AdapterError("model: has no dense adapter that is trained; attach(model, spec) without masks first")
    if sharded.has_engine(model):
        raise AdapterError(
            "model: is trained by an engine of DeepSpeed, which does not take new parameters; call engine.destroy() "
            "first, and deepspeed.initialize after sparsify"
        )
    by_name = cast(Mapping[str, Mapping[str, Tensor]], masks if isinstance(spec, Mapping) else {"": masks})
    if isinstance(spec, Mapping) and by_name.keys() != spec.keys():
        raise AdapterError(
            f"masks: got masks for {', '.join(masks) or 'nothing'}; the model has adapters {', '.join(spec)}, all of "
            "which get one"
        )
    for name, of_one in by_name.items():
        _refuse_other_modules(of_one, layers, f"{name}: " if name else "")
    of_updates = [
        _positions(path, by_name[name], (delta.out_features, delta.rank), f"{name}: " if name else "")
        for path, name, delta in updates
    ]
    sharded.reshard(model)
    deltas = [(path, delta) for path, _, delta in updates]
    places = sharded.forget(model, [delta for _, delta in deltas])
    for delta, index in zip([delta for _, delta in deltas], of_updates, strict=True):
        delta.restrict(index)
    saved.begin_again(model)
    for module in saved.routed(model):
        module.begin_again()
    if sharded.is_fully_sharded(model):
        sharded.join(model, deltas, places)


def separate_tasks(model: nn.Module, num_tasks: int) -> PerTask:
    """Makes backward passes give each task's gradient to the returned object, and none to the parameters."""
    penalised = next((one for one in formed.formed(_attached(model)).values() if one.has_penalty), None)
    if penalised is not None:
        raise AdapterError(
            f"form: {penalised.choice.name} has a penalty, which is not the gradient of a task; set its weight "
            "to 0, or train without a balance"
        )
    gradients = PerTask(num_tasks=num_tasks)
    for layer in _attached(model).values():
        for delta in layer.deltas:
            delta.per_task = gradients
    return gradients


def projection_checksums(model: nn.Module) -> dict[str, str]:
    """Module path -> checksum of the A in memory, of a model that is trained: one update per target, or, of several
    adapters, one of each, under `name_of(path, adapter)`.

    Where A is recomputed, it is made for this, a module at a time. A trained A counts as it was at the start.
    """
    return {
        name_of(path, name): delta.checksum() for path, layer in adapted(model).items() for name, delta in _owned(layer)
    }


def _owned(layer: AdaptedLinear) -> list[tuple[str, BaseDelta]]:
    """The name of each adapter, which one alone does not have, and its update."""
    if isinstance(layer, RoutedLinear):
        return [(layer.routing.names[owner], d) for owner, d in zip(layer.owners, layer.deltas, strict=True)]
    return [("", delta) for delta in layer.deltas[:1]]


def extract(
    model: nn.Module,
    *,
    name: str,
    values: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter that a model being trained holds.

    A collective where the model is sharded, by `fully_shard` or at ZeRO's stage 3: every rank calls it, and gets all.

    name: of the task, and of the adapter where the model trains several. values: module path -> (kept,) on the CPU
    replaces the parameters; they are not copied. A trained A, (rank * in_features,), has the key
    `per_task.of_a(path)`, and a parameter that is trained in full, flat, `saved.key(name)`. base: identity of the base.
    Raises AdapterError for a model whose adapter was attached ready-made and is not trained.
    """
    model = sharded.unwrapped(model)
    layers, spec = _attached(model), getattr(model, ATTACHED)
    _refuse_forms(layers, "extract")
    if isinstance(spec, Mapping):
        _check_named(model, name)
    one, adapter = (spec[name], name) if isinstance(spec, Mapping) else (spec, None)
    if isinstance(one, Adapter) and not trainable(model, adapter):
        raise AdapterError("model: holds an adapter that was trained before; save that one itself, or attach a Spec")
    of_several: dict[str, Spec | Adapter] = spec if isinstance(spec, dict) else {}
    own, spec = (name, of_several[name]) if of_several else ("", spec)
    deltas = {
        path: delta
        for path, layer in layers.items()
        for owner, delta in _owned(layer)
        if owner == own and isinstance(delta, Delta)
    }
    if values is None:
        sharded.reshard(model)
        heads = {whole: parameter for of, whole, parameter in saved.trained(model) if of == own}
        held: dict[str, Tensor] = {path: delta.values for path, delta in deltas.items() if delta.values is not None}
        held |= {per_task.of_a(path): d.trained_a for path, d in deltas.items() if d.trained_a is not None}
        held |= {saved.key(name): parameter for name, parameter in heads.items()}
        values = {name: sharded.full(parameter) for name, parameter in held.items()}
    entries = {path: Entries(index=_index(delta), values=values[path]) for path, delta in deltas.items() if delta.kept}
    shapes_of_saved = saved.shapes_of_copies(model, [*of_several].index(own)) if own else saved.shapes(model)
    whole = {name: values[saved.key(name)].view(shape) for name, shape in shapes_of_saved.items()}
    if isinstance(spec, Adapter):
        block = dataclasses.replace(spec.blocks[0], name=name, entries=entries)
        return dataclasses.replace(spec, blocks=(block,), base=dict(base or spec.base), saved=whole)
    is_stored = spec.projection == "trained" or spec.given is not None
    projections = {path: _stored_a(deltas[path], values) for path in entries} if is_stored else {}
    block = Block(
        name=name,
        seed=None if is_stored else spec.seed,
        rank=spec.rank,
        alpha=spec.alpha,
        dtype=torch.float32 if is_stored else spec.dtype,
        entries=entries,
        checksums={path: checksum(a) for path, a in projections.items()}
        if is_stored
        else {path: delta.checksum() for path, delta in deltas.items()},
        projections=projections,
    )
    shapes = {path: features(layers[path].base) for path in deltas}
    return Adapter(shapes=shapes, blocks=(block,), targets=spec.targets, base=dict(base or {}), saved=whole)


def _stored_a(delta: Delta, values: Mapping[str, Tensor]) -> Tensor:
    """The A that an adapter stores: the trained one among the values, or the one that was given."""
    found = values.get(per_task.of_a(delta.recipe.module))
    return delta.a().cpu() if found is None else found.view(delta.rank, -1)


def _index(delta: Delta) -> Tensor | None:
    """Not a copy where it need not be: positions never change."""
    return None if delta.index is None else delta.index.cpu()


def _attached(model: nn.Module) -> dict[str, AdaptedLinear]:
    if getattr(model, ATTACHED, None) is None:
        raise AdapterError("model: no adapter is attached; attach(model, spec) first")
    return adapted(model)


def _from_spec(
    model: nn.Module, spec: Spec, masks: Mapping[str, Tensor] | None, before: Adapter | None
) -> dict[str, AdaptedLinear]:
    bases = match(model, spec.targets, spec.modules_to_save, spec.exclude)
    if spec.form is not None:
        return _of_form(bases, spec, masks, before)
    if before is not None:
        _refuse_other_projection(before, spec, {path: features(base) for path, base in bases.items()})
    _refuse_other_modules(masks or {}, bases)
    return {path: AdaptedLinear(base, [_delta(path, base, spec, masks, before)]) for path, base in bases.items()}


def _of_form(
    bases: Mapping[str, nn.Module], spec: Spec, masks: Mapping[str, Tensor] | None, before: Adapter | None
) -> dict[str, AdaptedLinear]:
    assert spec.form is not None
    expert = next((path for path, base in bases.items() if isinstance(base, Expert)), None)
    if expert is not None:
        raise AdapterError(
            f"{expert}: is a matrix of fused experts, which take the form lori alone; exclude the experts, or remove "
            f"the form {spec.form.name}"
        )
    if before is not None and not declares(spec.form.name, spec.form.options, "IN_SEQUENCE"):
        raise AdapterError(f"before: the form {spec.form.name} cannot be added to what was trained earlier; remove it")
    if before is not None:
        if spec.projection == "trained":
            raise AdapterError("projection: trained gives each task its own A, and before has another; set only one")
        _refuse_other_projection(before, spec, {path: features(base) for path, base in bases.items()})
    found = formed.deltas_for(bases, spec, masks, _device, before)
    return {path: AdaptedLinear(bases[path], [delta]) for path, delta in found}


def _refuse_other_modules(masks: Mapping[str, Tensor], targets: Mapping[str, nn.Module], where: str = "") -> None:
    for path in masks:
        if path not in targets:
            raise AdapterError(f"{where}masks: there is a mask for {path}, which is not a target; {listing(targets)}")


def _refuse_other_projection(before: Adapter, spec: Spec, shapes: Mapping[str, tuple[int, int]]) -> None:
    wanted = {"seed": spec.seed, "rank": spec.rank, "scale": spec.scale, "dtype": spec.dtype}
    for block in before.blocks:
        found = {"seed": block.seed, "rank": block.rank, "scale": block.scale, "dtype": block.dtype}
        other = next((key for key in wanted if found[key] != wanted[key]), None)
        if other is not None:
            raise AdapterError(
                f"before: {block.name} has {other} {found[other]}, what is to be added to it {wanted[other]}; only "
                "entries on the same A can be added"
            )
    if dict(before.shapes) != dict(shapes):
        other = next(path for path in {**before.shapes, **shapes} if before.shapes.get(path) != shapes.get(path))
        raise AdapterError(
            f"before: {other} is {before.shapes.get(other)} there and {shapes.get(other)} here; give the same targets"
        )


def _sum(adapter: Adapter, path: str) -> Kept | None:
    """B of a module, of all blocks together; None where it is zero."""
    entries = [block.entries[path] for block in adapter.blocks if path in block.entries]
    if len(entries) < 2:
        return (entries[0].index, entries[0].values) if entries else None
    out_features, _ = adapter.shapes[path]
    flat = torch.stack([one.dense(out_features, adapter.blocks[0].rank).flatten() for one in entries]).sum(0)
    if any(one.index is None for one in entries):
        return None, flat
    index = torch.unique(torch.cat([one.index for one in entries if one.index is not None]))
    return index, flat[index.long()]


def _delta(path: str, base: nn.Module, spec: Spec, masks: Mapping[str, Tensor] | None, before: Adapter | None) -> Delta:
    out_features, in_features = features(base)
    start = spec.start_of(path, in_features)
    index = None if masks is None else _positions(path, masks, (out_features, spec.rank))
    return Delta(
        module=path,
        in_features=in_features,
        out_features=out_features,
        seed=None if start is not None else spec.seed,
        rank=spec.rank,
        scale=spec.scale,
        dtype=spec.dtype,
        index=index,
        device=_device(base),
        cached=spec.projection == "cached",
        trains_a=spec.projection == "trained",
        stored=None if start is None else start.a,
        before=None if before is None else _sum(before, path),
    )


def _positions(path: str, masks: Mapping[str, Tensor], shape: tuple[int, int], where: str = "") -> Tensor | None:
    """Flat positions of a module's kept entries, int32; None for all of them."""
    if path not in masks:
        raise AdapterError(f"{where}masks: no mask for {path}; give one for every target, or none at all")
    mask = masks[path]
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise AdapterError(
            f"{where}masks: the mask of {path} is {mask.dtype} {tuple(mask.shape)}; wanted torch.bool {shape}"
        )
    return None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(torch.int32)


def _from_adapter(model: nn.Module, adapter: Adapter, goes_on: bool) -> dict[str, AdaptedLinear]:
    def deltas(path: str, base: nn.Module) -> list[Delta]:
        return [_trained(path, base, block, goes_on) for block in adapter.blocks if path in block.entries]

    return {path: AdaptedLinear(base, deltas(path, base)) for path, base in trained_on(model, adapter).items()}


def trained_on(model: nn.Module, adapter: Adapter | TaskAdapter) -> dict[str, nn.Module]:
    linear = linear_layers(model)
    for path in adapter.shapes:
        if path not in linear:
            raise AdapterError(
                f"{path}: the adapter was trained on this linear layer, which the model does not have; use the base "
                f"model it was trained on, in the same class; {listing(linear)}"
            )
        refuse_unadaptable(model, path, linear[path])
    bases = {path: module for path, module in linear.items() if path in adapter.shapes}
    for path, shape in adapter.shapes.items():
        if features(bases[path]) != shape:
            raise AdapterError(
                f"{path}: the adapter was trained on a weight of shape {shape}, this model's is "
                f"{features(bases[path])}; use the base model it was trained on"
            )
    return bases


@torch.no_grad()
def _trained(path: str, base: nn.Module, block: Block, goes_on: bool) -> Delta:
    entries, is_meta = block.entries[path], _device(base).type == "meta"
    if is_meta and not goes_on:
        raise AdapterError(f"{path}: is on the meta device, where a trained adapter has no values; load the base first")
    out_features, in_features = features(base)
    delta = Delta(
        module=path,
        in_features=in_features,
        out_features=out_features,
        seed=block.seed,
        rank=block.rank_of(path),
        scale=block.scale,
        dtype=block.dtype,
        index=entries.index,
        device=_device(base),
        stored=None if block.seed is not None else block.projection(path, in_features),
    )
    if not is_meta:
        refuse_other_projections(block, {path: checksum(delta.a())})
        assert delta.values is not None
        delta.values.copy_(entries.values)
    return delta


def refuse_other_projections(block: Block, made: Mapping[str, str]) -> None:
    """Raises AdapterError where A is another than the block was trained with. made: module path -> checksum of A."""
    for path, found in made.items():
        if found != block.checksums[path]:
            what = "its A" if block.seed is None else f"A made from seed {block.seed}"
            raise AdapterError(
                f"{path}: {what} has checksum {found}, the adapter was trained "
                f"with {block.checksums[path]}; the file is damaged or comes from another generator"
            )


def _refuse_unfoldable(model: nn.Module, bases: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, base in bases.items():
        if is_quantized(base):
            raise AdapterError(
                f"{path}: its weight is quantised ({type(base).__name__}); fold(model, dequantize=True) makes it a "
                "plain layer first, or keep the adapter unfolded"
            )
        is_expert = isinstance(base, Expert)
        weight = base.fused if is_expert else base.get_parameter("weight")
        if len(owners[id(weight)]) > 1:
            raise AdapterError(
                f"{path}: its weight is tied to {', '.join(owners[id(weight)])}; folding would change all of them, "
                "so untie it first or keep the adapter unfolded"
            )
        if hasattr(weight, "placements") or tuple(weight.shape[1:] if is_expert else weight.shape) not in (
            features(base),
            features(base)[::-1],
        ):
            raise AdapterError(f"{path}: its weight is sharded; save the adapter and fold it in one process")
        if not weight.dtype.is_floating_point:
            raise AdapterError(f"{path}: its weight is {weight.dtype}; fold takes floating point weights")


def _add(layer: AdaptedLinear, sign: float) -> None:
    weight = layer.weight
    # Summed before it is rounded to the weight's dtype, once: a merge has as many updates as tasks.
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    assert layer.folded is not None
    for delta, values in zip(layer.deltas, layer.folded, strict=True):
        assert isinstance(delta, Delta)
        update = delta.weight(values).mul_(sign)
        total = total + (update.t() if is_conv1d(layer.base) else update)
    weight.copy_(total)


def _values(delta: BaseDelta) -> Tensor | None:
    """A copy: what is trained or loaded later was not folded."""
    values = delta.trained().get("")
    return None if values is None else values.detach().clone()


def _dtype(model: nn.Module) -> torch.dtype:
    """Data type in which a quantised model computes: that of its other weights, such as embeddings."""
    own = (module for module in model.modules() if not isinstance(module, BaseDelta) and not is_quantized(module))
    weights = (weight for module in own for weight in module.parameters(recurse=False))
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def _device(base: nn.Module) -> torch.device:
    return base.weight.device  # type: ignore[return-value]
