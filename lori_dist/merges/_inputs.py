"""What every merge asks of its inputs, and the adapter its blocks make."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from lori_dist.adapter.adapter import Adapter, Block
from lori_dist.adapter.projection import checksum
from lori_dist.errors import AdapterError, ConfigError


def check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Raises AdapterError for adapters that cannot be merged, ConfigError for weights that do not fit them."""
    if not adapters:
        raise AdapterError("merge: no adapters were given; give at least one")
    labels = [_label(adapter) for adapter in adapters]
    if len(weights) != len(adapters):
        raise ConfigError(
            f"merge.weights: {len(weights)} given for {len(adapters)} adapters ({', '.join(labels)}); "
            "give one weight per adapter"
        )
    for label, weight in zip(labels, weights, strict=True):
        if not math.isfinite(weight):
            raise ConfigError(f"merge.weights: {weight} was given for {label}; give a finite number")
    for before, adapter in enumerate(adapters):
        for other in adapters[:before]:
            _refuse_unlike(other, adapter)


def shared(blocks: Sequence[Block]) -> dict[tuple[object, ...], list[Block]]:
    """The blocks by the A they stand on: seed, rank and dtype, in the order of their first."""
    groups: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        groups.setdefault((block.seed, block.rank, block.dtype), []).append(block)
    return groups


def weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Block]:
    """All blocks, each with its adapter's weight times its own."""
    return [
        dataclasses.replace(block, weight=float(weight) * block.weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        for block in adapter.blocks
    ]


def join(adapters: Sequence[Adapter], blocks: Sequence[Block]) -> Adapter:
    """The adapter of `blocks` over all modules of `adapters`. Blocks of one name are told apart: `math`, `math-2`."""
    targets = {adapter.targets for adapter in adapters}
    shapes = {module: shape for adapter in adapters for module, shape in adapter.shapes.items()}
    return Adapter(
        shapes=shapes,
        blocks=tuple(_named_apart([_complete(block, shapes) for block in blocks])),
        targets=targets.pop() if len(targets) == 1 else tuple(shapes),
        base=next((adapter.base for adapter in adapters if "weights" in adapter.base), adapters[0].base),
        generator=adapters[0].generator,
    )


def _refuse_unlike(one: Adapter, other: Adapter) -> None:
    first, second = _label(one), _label(other)
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
    for module, shape in one.shapes.items():
        if other.shapes.get(module, shape) != shape:
            raise AdapterError(
                f"{module}: {first} was trained on a weight of shape {shape}, {second} on {other.shapes[module]}; "
                "merge adapters of one base model"
            )


def _label(adapter: Adapter) -> str:
    return "+".join(block.name for block in adapter.blocks)


def _complete(block: Block, shapes: Mapping[str, tuple[int, int]]) -> Block:
    """The block with a checksum of A for every module, also for those that only other blocks adapt."""
    if block.checksums.keys() == shapes.keys():
        return block
    checksums = {
        module: block.checksums.get(module) or checksum(block.projection(module, in_features))
        for module, (_, in_features) in shapes.items()
    }
    return dataclasses.replace(block, checksums=checksums)


def _named_apart(blocks: Sequence[Block]) -> Iterator[Block]:
    taken: set[str] = set()
    for block in blocks:
        name, number = block.name, 2
        while name in taken:
            name, number = f"{block.name}-{number}", number + 1
        taken.add(name)
        yield dataclasses.replace(block, name=name)
