"""Multi-task LoRI fine-tuning: sparse adapters on a frozen, seeded projection.

The public names are listed here one by one and loaded at first use (PEP 562), so that importing the package, or
checking a configuration with it, imports no torch. They and the verbs of `lori` are what users can rely on; README.md
in this folder is the map of the rest. To make a name public, add it to all three lists below.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec
    from lori_dist.adapter.attach import adapted, attach, dense, detach, extract, fold, sparsify, trainable, unfold
    from lori_dist.adapter.packed import attach_several
    from lori_dist.adapter.projection import projection
    from lori_dist.config import Run
    from lori_dist.config import load as load_run
    from lori_dist.errors import AdapterError, ConfigError, JobError, LoriError
    from lori_dist.formats.forms import load_tasks
    from lori_dist.formats.native import load as load_adapter
    from lori_dist.formats.native import save as save_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "Block",
    "ConfigError",
    "Entries",
    "JobError",
    "LoriError",
    "Run",
    "Spec",
    "adapted",
    "attach",
    "attach_several",
    "dense",
    "detach",
    "extract",
    "fold",
    "load_adapter",
    "load_run",
    "load_tasks",
    "projection",
    "save_adapter",
    "sparsify",
    "trainable",
    "unfold",
]

_PLACES = {
    "Adapter": "adapter.adapter:Adapter",
    "AdapterError": "errors:AdapterError",
    "Block": "adapter.adapter:Block",
    "ConfigError": "errors:ConfigError",
    "Entries": "adapter.adapter:Entries",
    "JobError": "errors:JobError",
    "LoriError": "errors:LoriError",
    "Run": "config:Run",
    "Spec": "adapter.adapter:Spec",
    "adapted": "adapter.attach:adapted",
    "attach": "adapter.attach:attach",
    "attach_several": "adapter.packed:attach_several",
    "dense": "adapter.attach:dense",
    "detach": "adapter.attach:detach",
    "extract": "adapter.attach:extract",
    "fold": "adapter.attach:fold",
    "load_adapter": "formats.native:load",
    "load_run": "config:load",
    "load_tasks": "formats.forms:load_tasks",
    "projection": "adapter.projection:projection",
    "save_adapter": "formats.native:save",
    "sparsify": "adapter.attach:sparsify",
    "trainable": "adapter.attach:trainable",
    "unfold": "adapter.attach:unfold",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
