"""The models that share a pass over the base, in which each row of a batch has its own adapter."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from lori_dist.adapter import attach, packed
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.task_adapter import TaskAdapter
from lori_dist.evaluation._answers import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Models that run together."""

    names: tuple[str, ...]
    adapters: Mapping[str, Adapter | TaskAdapter]
    """Adapters of the models that have one."""
    is_routed: bool
    """Whether each row meets its own adapter; else there is at most one."""


def passes_of(
    model: PreTrainedModel, adapters: Mapping[str, Adapter | TaskAdapter], names: Sequence[str]
) -> list[Pass]:
    """The passes over the base, as few as possible: one for each adapter that rows cannot be routed to, then one for
    all others with the base.

    names: of all models; those without an adapter are the base.
    """
    apart = [name for name, adapter in adapters.items() if not packed.is_routable(model, {name: adapter})]
    found = [Pass(names=(name,), adapters={name: adapters[name]}, is_routed=False) for name in apart]
    together = tuple(name for name in names if name not in apart)
    if together:
        of_them = {name: adapters[name] for name in together if name in adapters}
        found.append(Pass(names=together, adapters=of_them, is_routed=bool(of_them)))
    return found


@contextlib.contextmanager
def attached(reader: Reader, one: Pass) -> Iterator[dict[str, str | None]]:
    """Inside, the adapters of a pass are on the model. Gives name -> what the reader calls that model."""
    if one.is_routed:
        ordinary = {name: adapter for name, adapter in one.adapters.items() if isinstance(adapter, Adapter)}
        reader.routing = packed.attach_several(reader.model, ordinary)
    elif one.adapters:
        [adapter] = one.adapters.values()
        attach.attach(reader.model, adapter)
    try:
        yield {name: name if one.is_routed and name in one.adapters else None for name in one.names}
    finally:
        if one.adapters:
            reader.routing = None
            attach.detach(reader.model)
            gc.collect()
