"""Adapters made up for the merges, and their updates in float64."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import checksum, projection

SHAPES = {
    "layers.0.q_proj": (6, 5),
    "layers.0.up_proj": (7, 5),
    "layers.1.q_proj": (6, 5),
    "layers.1.up_proj": (3, 8),
}


def block(
    name: str = "task",
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: float = 4.0,
    dtype: torch.dtype = torch.float32,
    weight: float = 1.0,
    modules: Sequence[str] = tuple(SHAPES),
    entries: Mapping[str, Entries] | None = None,
    draw: int = 0,
    density: float = 0.5,
    values_dtype: torch.dtype = torch.float64,
) -> Block:
    """A block with random entries; draw: seed of those."""
    generator = torch.Generator().manual_seed(draw)
    if entries is None:
        entries = {
            module: random_entries(SHAPES[module][0] * rank, density, generator, values_dtype) for module in modules
        }
    return Block(
        name=name,
        seed=seed,
        rank=rank,
        alpha=alpha,
        dtype=dtype,
        weight=weight,
        entries=entries,
        checksums={
            module: checksum(projection(seed, module, rank, SHAPES[module][1], dtype=dtype)) for module in modules
        },
    )


def random_entries(num_entries: int, density: float, generator: torch.Generator, dtype: torch.dtype) -> Entries:
    num_kept = max(1, round(density * num_entries))
    values = torch.randn(num_kept, dtype=torch.float64, generator=generator).to(dtype)
    if num_kept == num_entries:
        return Entries(index=None, values=values)
    index = torch.randperm(num_entries, generator=generator)[:num_kept].sort().values.to(torch.int32)
    return Entries(index=index, values=values)


def adapter(
    *blocks: Block,
    modules: Sequence[str] = tuple(SHAPES),
    targets: str | tuple[str, ...] = "all-linear",
    **fields: object,
) -> Adapter:
    shapes = {module: SHAPES[module] for module in modules}
    return Adapter(shapes=shapes, blocks=blocks, targets=targets, **fields)  # type: ignore[arg-type]


def delta(what: Adapter, module: str) -> Tensor:
    """The update of one module in float64; zero where it is not adapted."""
    out_features, in_features = SHAPES[module]
    update = torch.zeros(out_features, in_features, dtype=torch.float64)
    for part in what.blocks:
        if module in part.entries:
            b = part.entries[module].dense(out_features, part.rank_of(module)).double()
            update += part.weight * part.alpha / part.rank * b @ part.projection(module, in_features).double()
    return update


WEIGHTS = st.floats(-2, 2).map(lambda weight: round(weight, 3))


@st.composite
def adapters(draw: st.DrawFn, number: int, *, shared: bool | None = None) -> list[Adapter]:
    """Adapters of unequal rank, alpha, dtype and targets, with modules that keep nothing, some of them on one A.

    shared: whether all stand on one A; None for some of them.
    """
    made = []
    for place in range(number):
        modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        kept = draw(st.lists(st.sampled_from(modules), unique=True))
        seed = {True: 7, False: place, None: draw(st.integers(0, 1))}[shared]
        rank = 2 if shared else draw(st.sampled_from([1, 2, 3]))
        dtype = torch.float32 if shared else draw(st.sampled_from([torch.float32, torch.bfloat16]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        density = draw(st.sampled_from([0.2, 0.5, 1.0]))
        entries = {
            module: random_entries(SHAPES[module][0] * rank, density, generator, torch.float64) for module in kept
        }
        part = block(
            f"task{place}",
            seed=seed,
            rank=rank,
            alpha=draw(st.sampled_from([1.0, 4.0, 3.3])),
            dtype=dtype,
            weight=draw(st.sampled_from([1.0, 1.0, -0.7])),
            modules=modules,
            entries=entries,
        )
        made.append(adapter(part, modules=modules, targets=draw(st.sampled_from(["all-linear", ("q_proj",)]))))
    return made
