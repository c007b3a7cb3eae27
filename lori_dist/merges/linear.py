"""The exact sum, at the tasks' own rank where they share A."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.errors import AdapterError
from lori_dist.merges._inputs import check, join, shared, weighted


def merge(adapters: Sequence[Adapter], *, weights: Sequence[float]) -> Adapter:
    """The exact weighted sum of updates, sum_t w_t D_t, with one block for each A.

    Blocks that share A (equal seed, rank and dtype) become one of the same rank: B = sum_t w_t s_t B_t, whose kept
    entries are the union of theirs, computed in float64 and kept in fp32 (or their own dtype, if that is wider). Blocks
    that share theirs with no other stay as they are, so the result has rank r if A is shared by all. Adapters may
    differ in rank, alpha, dtype and targets; a module that one of them does not adapt gets nothing from it.
    weights: one per adapter, of any sign.
    Raises ConfigError for weights that do not fit, AdapterError for adapters of different bases, shapes or generators.
    Source: LoRI (arXiv 2504.07448), linear merging, on updates: A and B averaged apart would add cross terms.
    """
    check(adapters, weights)
    merged = join(adapters, weighted(adapters, weights))
    blocks = [_sum(blocks, merged.shapes) for blocks in shared(merged.blocks).values()]
    return join([merged], blocks)


def _sum(blocks: Sequence[Block], shapes: Mapping[str, tuple[int, int]]) -> Block:
    """One block with the sum of the updates of blocks that share A."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    is_same = all(block.alpha == first.alpha for block in blocks)
    alpha = first.alpha if is_same and first.alpha != 0 else float(first.rank)
    shares = [block.scale * first.rank / alpha for block in blocks]
    entries = {}
    for module, (out_features, _) in shapes.items():
        terms = [
            (share, block.entries[module])
            for share, block in zip(shares, blocks, strict=True)
            if module in block.entries
        ]
        if terms:
            entries[module] = _sum_entries(terms, out_features * first.rank)
    return Block(
        name="+".join(block.name for block in blocks),
        seed=first.seed,
        rank=first.rank,
        alpha=alpha,
        dtype=first.dtype,
        entries=entries,
        checksums=_checksums(blocks),
    )


def _sum_entries(terms: Sequence[tuple[float, Entries]], num_entries: int) -> Entries:
    dtype = torch.float32
    for _, entries in terms:
        dtype = torch.promote_types(dtype, entries.values.dtype)
    index = _union([entries.index for _, entries in terms], num_entries)
    total = torch.zeros(num_entries if index is None else index.numel(), dtype=torch.float64)
    for share, entries in terms:
        values = entries.values.double() * share
        if entries.index is None:
            total += values
        else:
            total.index_add_(0, _places(index, entries.index), values)
    return Entries(index=index, values=total.to(dtype))


def _union(indices: Sequence[Tensor | None], num_entries: int) -> Tensor | None:
    """Every position in any of the indices, ascending; None if that is all of them."""
    given = [index for index in indices if index is not None]
    if len(given) < len(indices):
        return None
    union = torch.unique(torch.cat(given))
    return None if union.numel() == num_entries else union


def _places(union: Tensor | None, index: Tensor) -> Tensor:
    return index.long() if union is None else torch.searchsorted(union, index)


def _checksums(blocks: Sequence[Block]) -> dict[str, str]:
    checksums: dict[str, str] = {}
    for block in blocks:
        for module, checksum in block.checksums.items():
            if checksums.setdefault(module, checksum) != checksum:
                raise AdapterError(
                    f"{module}: A of {block.name} has checksum {checksum}, another of the same seed {block.seed} has "
                    f"{checksums[module]}; one of the adapters is damaged, write it again"
                )
    return checksums
