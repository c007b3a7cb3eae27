"""Several adapters on one model, each met by its own rows of a batch."""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lori_dist.adapter import saved, sharded
from lori_dist.adapter.adapter import Adapter, Block, Spec, in_memory
from lori_dist.adapter.attach import ATTACHED, adapted, layers_for, put, refuse_adapted, trained_on
from lori_dist.adapter.linear import AdaptedLinear, Delta
from lori_dist.adapter.per_task import of_a
from lori_dist.adapter.probe import probe
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.routing import Routing, name_of
from lori_dist.adapter.task_adapter import TaskAdapter
from lori_dist.errors import AdapterError


def attach(
    model: nn.Module,
    what: Mapping[str, Spec | Adapter],
    masks: Mapping[str, Mapping[str, Tensor] | None] | None = None,
) -> Routing:
    """Puts an adapter to train for each name on a model, in place, whose base is frozen.

    what: by name; adapters continue from their values. masks: name -> module path -> (out_features, rank) bool;
    without masks all entries of B exist. Returns the routing, whose `begin` is called before each batch.
    Raises AdapterError as `attach.attach`, and where modules_to_save differ.
    """
    refuse_adapted(model)
    _refuse_forms(what)
    whole = {one.modules_to_save if isinstance(one, Spec) else tuple(one.saved) for one in what.values()}
    if len(whole) > 1 or any(isinstance(one, Adapter) and one.saved for one in what.values()):
        raise AdapterError(
            "modules_to_save: adapters that are trained over one base have the same; give all of them one list"
        )
    [modules_to_save] = whole
    routing, _ = _attach(model, what, masks or {}, saved.owned(model, [modules_to_save] * len(what), [{}] * len(what)))
    return routing


def _attach(
    model: nn.Module,
    what: Mapping[str, Spec | Adapter],
    masks: Mapping[str, Mapping[str, Tensor] | None],
    owned: Mapping[str, saved.Owned],
) -> tuple[Routing, dict[str, tuple[saved.RoutedModule, nn.Module]]]:
    """What `attach` does, with these modules to train in full. Returns those as `saved.route` does."""
    routing = Routing(names=tuple(what), collects=True)
    layers = _layers(model, what, masks, routing, train=True)
    saved.refuse_both(layers, [f"{path}.{name}" for path in owned for name in saved.names_in(model, path)])
    model.requires_grad_(False)
    routed = saved.route(model, owned, routing)
    put(model, layers)
    setattr(model, ATTACHED, dict(what))
    return routing, routed


def _refuse_forms(what: Mapping[str, Spec | Adapter]) -> None:
    form = next((one.form for one in what.values() if isinstance(one, Spec) and one.form is not None), None)
    if form is not None:
        raise AdapterError(
            f"form: {form.name} trains tasks together, as one Spec; attach that with attach, or remove the form"
        )


def attach_several(
    model: nn.Module,
    adapters: Mapping[str, Adapter | Spec],
    *,
    masks: Mapping[str, Mapping[str, Tensor]] | None = None,
    heads: Mapping[str, Mapping[str, nn.Module]] | None = None,
) -> Routing:
    """Puts several adapters on a model, in place, each under a name. `rows` of what this returns says which row of a
    batch meets which; before the first time, all meet the first.

    With Adapters: trained ones, frozen, for inference. They may have been trained on other targets, with other ranks,
    and be merges. The model may be one that `fully_shard` was applied to: every rank then has all of the adapters, and
    its own rows.
    With Specs: adapters to train together over one frozen base. `trainable`, `dense`, `extract` and `sparsify` take
    such a model, and name the adapter. Each parameter's gradient is that of its own adapter's rows, so each is trained
    as it would be alone. The model may be one that `fully_shard` was applied to; for DDP and DeepSpeed call this first.
    masks: name -> module path -> (out_features, rank) bool, the entries of B that exist; without masks, all do.
    heads: name -> path, or its last part, of a module -> one that the adapter has instead, such as a classifier with
    another number of labels. It is trained in full from the values that it has, as what modules_to_save names is from
    those of the base. With Adapters: one of the same kind, needed only where that is not the kind of the base's.
    Logits have as many labels as the largest head, the base's included; those that a row's head does not have are the
    least number of the dtype, which changes no softmax.
    Raises AdapterError as `attach.attach`, for Specs beside Adapters, for masks of Adapters, and for heads of unknown
    adapters or modules.
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
    saved.refuse_unknown(heads or {}, tuple(adapters), "adapter")
    if specs:
        return _attach_specs(model, specs, masks, heads or {})
    return _attach_trained(model, trained, masks, heads or {})


def _attach_specs(
    model: nn.Module,
    specs: Mapping[str, Spec],
    masks: Mapping[str, Mapping[str, Tensor]] | None,
    heads: Mapping[str, Mapping[str, nn.Module]],
) -> Routing:
    if masks is not None and masks.keys() != specs.keys():
        raise AdapterError(
            f"masks: got masks for {', '.join(masks) or 'nothing'}; wanted them for {', '.join(specs)}, or none at all"
        )
    _refuse_forms(specs)
    sharded.refuse_late(model)
    refuse_adapted(model)
    sharded.reshard(model)
    given = {name: heads.get(name, {}) for name in specs}
    specs = {
        name: dataclasses.replace(spec, modules_to_save=tuple(dict.fromkeys((*spec.modules_to_save, *given[name]))))
        for name, spec in specs.items()
    }
    owned = saved.owned(model, [spec.modules_to_save for spec in specs.values()], [*given.values()])
    saved.refuse_empty(model, owned)
    routing, whole = _attach(model, specs, masks or {}, owned)
    routing.collects = False
    if sharded.is_fully_sharded(model):
        deltas = [(path, delta) for path, layer in routed(model).items() for delta in layer.deltas]
        sharded.join(model, [*deltas, *((path, module) for path, (module, _) in whole.items())])
    saved.keep_bases(whole)
    routing.only(routing.names[0])
    return routing


def _attach_trained(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    masks: Mapping[str, Mapping[str, Tensor]] | None,
    heads: Mapping[str, Mapping[str, nn.Module]],
) -> Routing:
    if masks is not None:
        raise AdapterError("masks: got masks for trained adapters, which have their own; remove them")
    model = sharded.unwrapped(model)
    sharded.refuse_split(model)
    refuse_adapted(model)
    reason = _mixing(model, adapters)
    if reason is not None:
        raise AdapterError(reason)
    routing = Routing(names=tuple(adapters))
    layers = _layers(model, adapters, {}, routing, train=False)
    tensors = [{name: in_memory(one) for name, one in adapter.saved.items()} for adapter in adapters.values()]
    owned = saved.owned_by_trained(model, tensors, [heads.get(name, {}) for name in adapters])
    model.requires_grad_(False)
    whole = saved.route(model, owned, routing)
    put(model, layers)
    deltas = [(path, delta) for path, layer in layers.items() for delta in layer.deltas]
    for _, delta in deltas:
        delta.requires_grad_(False)
    sharded.place(model, [*deltas, *((path, module.requires_grad_(False)) for path, (module, _) in whole.items())])
    saved.keep_bases(whole)
    setattr(model, ATTACHED, dict(adapters))
    routing.only(routing.names[0])
    return routing


@torch.no_grad()
def update(model: nn.Module, adapters: Mapping[str, Adapter]) -> bool:
    """Gives some of the adapters of `attach_several` other weights and kept values, in place, where A and the places of
    the entries are those they have. Returns whether this is so, and an update that adapters share keeps its values; if
    not, nothing has changed."""
    model = sharded.unwrapped(model)
    held = getattr(model, ATTACHED, None)
    if not isinstance(held, Mapping) or not all(_is_alike(held.get(name), one) for name, one in adapters.items()):
        return False
    changes: list[tuple[Delta, Tensor]] = []
    scales: list[tuple[dict[int, float], int, float]] = []
    for path, layer in routed(model).items():
        for name, adapter in adapters.items():
            number = layer.routing.names.index(name)
            mine = [place for place, of in enumerate(layer.scales) if number in of]
            before, blocks = ([one for one in of.blocks if path in one.entries] for of in (held[name], adapter))
            for place, old, new in zip(mine, before, blocks, strict=True):
                delta, of_update = layer.deltas[place], layer.scales[place]
                if not delta.is_stored and (delta.recipe.seed, delta.recipe.rank) != (new.seed, new.rank):
                    return False  # those that have it as well have it at another place
                scales.append((of_update, number, new.scale))
                if not _equal(old.entries[path].values, new.entries[path].values):
                    if len(of_update) > 1:
                        return False
                    changes.append((delta, new.entries[path].values))
    for delta, values in changes:
        assert delta.values is not None
        delta.values.copy_(values)
    for of_update, number, scale in scales:
        of_update[number] = scale
    setattr(model, ATTACHED, {**held, **adapters})
    return True


def _is_alike(one: object, other: Adapter) -> bool:
    """Whether two adapters differ in weights and kept values alone."""
    if not isinstance(one, Adapter) or one.saved or other.saved or one.shapes.keys() != other.shapes.keys():
        return False
    return len(one.blocks) == len(other.blocks) and all(map(_has_the_same_places, one.blocks, other.blocks))


def _has_the_same_places(one: Block, other: Block) -> bool:
    if (one.seed, one.rank, one.dtype, one.checksums) != (other.seed, other.rank, other.dtype, other.checksums):
        return False
    if one.entries.keys() != other.entries.keys():
        return False
    return all(_equal(entries.index, other.entries[path].index) for path, entries in one.entries.items())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def is_routable(model: nn.Module, adapters: Mapping[str, Adapter | TaskAdapter]) -> bool:
    """Whether the rows of a pass over the base may meet them: an adapter with modules_to_save is attached by itself
    there, as each has a copy of these, and so is one of layers that mix rows."""
    apart = any(isinstance(one, TaskAdapter) or one.saved for one in adapters.values())
    return not apart and _mixing(model, adapters) is None


def _mixing(model: nn.Module, adapters: Mapping[str, Adapter | TaskAdapter]) -> str | None:
    """Why rows do not reach every layer as they are; None if they do."""
    known = probe(model)
    paths = (path for adapter in adapters.values() for path in trained_on(model, adapter))
    mixing = next((path for path in paths if known.mixes_rows(path)), None)
    if mixing is None:
        return None
    return f"{mixing}: its input is not divided into rows; attach one adapter at a time"


def _layers(
    model: nn.Module,
    what: Mapping[str, Spec | Adapter],
    masks: Mapping[str, Mapping[str, Tensor] | None],
    routing: Routing,
    *,
    train: bool,
) -> dict[str, AdaptedLinear]:
    """Module path -> the layer with the updates of all adapters, in the model's order."""
    found: dict[str, tuple[nn.Module, list[Delta], list[dict[int, float]]]] = {}
    for number, (name, one) in enumerate(what.items()):
        for path, layer in layers_for(model, one, masks=masks.get(name), train=train).items():
            _, deltas, scales = found.setdefault(path, (layer.base, [], []))
            for delta in layer.deltas:
                assert isinstance(delta, Delta)
                # Merges have the updates of their tasks, with weights of their own.
                place = None if train else next((n for n, known in enumerate(deltas) if _is_same(known, delta)), None)
                if place is None or number in scales[place]:
                    deltas.append(delta)
                    scales.append({number: delta.scale})
                else:
                    scales[place][number] = delta.scale
    return {
        path: RoutedLinear(base, deltas, module=path, routing=routing, scales=scales)
        for path, (base, deltas, scales) in found.items()
    }


def _is_same(one: Delta, other: Delta) -> bool:
    """Whether two updates differ in scale alone."""
    if one.recipe != other.recipe or one.is_stored != other.is_stored:
        return False
    pairs = [(one.index, other.index), (one.values, other.values), (one.before_values, other.before_values)]
    pairs += [(one.projection, other.projection)] if one.is_stored else []
    return all(_equal(mine, theirs) for mine, theirs in pairs)


def routed(model: nn.Module) -> dict[str, RoutedLinear]:
    """Module path -> the layer of a model that has several adapters, in the model's order."""
    return {path: layer for path, layer in adapted(model).items() if isinstance(layer, RoutedLinear)}


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and parameters of what is trained, adapter by adapter: of each its kept entries, its A and its
    modules_to_save, in the model's order."""
    layers = routed(model)
    names = next(iter(layers.values())).routing.names if layers else ()
    for number, name in enumerate(names):
        deltas = [(path, delta) for path, layer in layers.items() for delta in layer.of(number)]
        yield from (
            (name_of(path, name), d.values) for path, d in deltas if d.values is not None and d.values.requires_grad
        )
        yield from ((name_of(of_a(path), name), d.trained_a) for path, d in deltas if d.trained_a is not None)
        for whole, parameter in saved.copies(model, number):
            yield name_of(saved.key(whole), name), parameter
