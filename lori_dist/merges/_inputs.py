"""Requirements of every merge on its inputs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.update import label
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.merges._weights import Weight, unmatched


def check(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> None:
    """Raises AdapterError for adapters that cannot be merged, ConfigError for weights that do not fit them."""
    if not adapters:
        raise AdapterError("merge: got no adapters; give at least one")
    labels = [label(adapter) for adapter in adapters]
    if len(weights) != len(adapters):
        raise ConfigError(
            f"merge.weights: {len(weights)} given for {len(adapters)} adapters ({', '.join(labels)}); "
            "give one weight per adapter"
        )
    for name, weight in zip(labels, weights, strict=True):
        for number in weight.values() if isinstance(weight, Mapping) else [weight]:
            if not math.isfinite(number):
                raise ConfigError(f"merge.weights: got {number} for {name}; give a finite number")
    problems = [
        f"merge.weights: of {name}, {problem}"
        for name, weight, adapter in zip(labels, weights, adapters, strict=True)
        for problem in unmatched(weight, list(adapter.shapes))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    for name, adapter in zip(labels, adapters, strict=True):
        if adapter.saved:
            raise AdapterError(
                f"merge: {name} has {next(iter(adapter.saved))}, which was trained in full (modules_to_save): no merge "
                "is defined for it; merge adapters without such modules"
            )
    for before, adapter in enumerate(adapters):
        for other in adapters[:before]:
            _refuse_unlike(other, adapter)


def _refuse_unlike(one: Adapter, other: Adapter) -> None:
    first, second = label(one), label(other)
    if one.generator != other.generator:
        raise AdapterError(
            f"merge: A of {first} comes from {one.generator}, A of {second} from {other.generator}; "
            "merge adapters of one generator"
        )
    weights = [adapter.base.get("weights") for adapter in (one, other)]
    if None not in weights and weights[0] != weights[1]:
        raise AdapterError(
            f"merge: {first} was trained on a base model with weights {weights[0]}, {second} on one with "
            f"{weights[1]}; merge adapters of one base model"
        )
    names = [adapter.base.get("name") for adapter in (one, other)]
    if None in weights and None not in names and Path(str(names[0])).name != Path(str(names[1])).name:
        raise AdapterError(
            f"merge: {first} was trained on the base model {names[0]}, {second} on {names[1]}; merge adapters of one "
            "base model, or, if these are two names of one, write the same into adapter_config.json"
        )
    for module, shape in one.shapes.items():
        if other.shapes.get(module, shape) != shape:
            raise AdapterError(
                f"{module}: {first} was trained on a weight of shape {shape}, {second} on {other.shapes[module]}; "
                "merge adapters of one base model"
            )
