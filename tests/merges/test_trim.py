"""Trimming over the whole model: that of one long vector, whatever is in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.errors import AdapterError
from lori_dist.formats import native
from lori_dist.merges import _cuts, merge, merge_files
from lori_dist.merges._cuts import common_cuts, largest
from tests.merges.made import SHAPES, adapter, adapters, block, delta, random_entries

MODEL = {"trim": "model"}


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 2.0, -3.0, 1e-300, 5e-324]), max_size=9), min_size=1),
    st.sampled_from([0.01, 0.3, 0.5, 0.8, 1.0]),
    st.sampled_from([0, 1, 3, 1 << 22]),
)
def test_what_stays_of_the_pieces_is_what_stays_of_the_whole(
    lists: list[list[float]], density: float, few: int
) -> None:
    pieces = [torch.tensor(numbers, dtype=torch.float64) for numbers in lists]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuts, "_FEW", few)  # so that nearly equal ones need all of the readings
        found = common_cuts(lambda: iter(pieces), density)
    kept = torch.cat([cut.keep(piece) for cut, piece in zip(found, pieces, strict=True)])
    assert torch.equal(kept, largest(torch.cat(pieces), density))


def test_one_piece_at_a_time_is_read_and_none_more_than_twice() -> None:
    readings: list[int] = []

    def pieces() -> Iterator[Tensor]:
        for seed in range(5):
            readings.append(seed)
            yield torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    common_cuts(pieces, 0.2)
    assert readings == [0, 1, 2, 3, 4] * 2


def trimmed(what: list[Adapter], density: float) -> list[Adapter]:
    """The adapters without what goes if each is one long vector of s_t B_t."""
    made = []
    for one in what:
        [part] = one.blocks
        whole = torch.cat([torch.zeros(0, dtype=torch.float64), *(e.values.double() for e in ordered(one).values())])
        pieces = iter(largest(whole, density).split([e.kept for e in ordered(one).values()]))
        entries = {}
        for module, old in ordered(one).items():
            kept = next(pieces)
            index = torch.arange(old.kept, dtype=torch.int32) if old.index is None else old.index
            if bool(kept.any()):
                entries[module] = Entries(index=index[kept], values=old.values[kept])
        made.append(
            adapter(
                block(
                    part.name,
                    seed=part.seed or 0,
                    rank=part.rank,
                    alpha=part.alpha,
                    weight=part.weight,
                    dtype=part.dtype,
                    modules=list(one.shapes),
                    entries=entries,
                ),
                modules=list(one.shapes),
            )
        )
    return made


def ordered(one: Adapter) -> dict[str, Entries]:
    return {module: one.blocks[0].entries[module] for module in one.shapes if module in one.blocks[0].entries}


@pytest.mark.parametrize("method", ["ties", "magnitude"])
@given(adapters(3, shared=True), st.sampled_from([0.05, 0.4, 1.0]))
def test_on_a_shared_a_it_is_the_merge_of_what_stays_of_b(method: str, tasks: list[Adapter], density: float) -> None:
    # Modules in the order of the merge: that of the first task that has them.
    order = list({module: shape for one in tasks for module, shape in one.shapes.items()})
    tasks = [adapter(*one.blocks, modules=[module for module in order if module in one.shapes]) for one in tasks]
    found = merge(tasks, method=method, weights=[1, 0.5, -1], options={"density": density, "space": "b", **MODEL})
    wanted = merge(trimmed(tasks, density), method=method, weights=[1, 0.5, -1], options={"density": 1.0, "space": "b"})
    for module in order:
        assert torch.allclose(delta(found, module), delta(wanted, module), rtol=0, atol=1e-12)


def test_of_updates_it_is_the_trim_of_all_of_them() -> None:
    tasks = [adapter(block(f"task{place}", seed=place, rank=3, draw=place)) for place in range(2)]
    merged = merge(tasks, method="magnitude", weights=[1, -2], options={"density": 0.3, "space": "dense", **MODEL})
    whole = [torch.cat([delta(task, module).flatten() for module in SHAPES]) for task in tasks]
    wanted = sum(weight * x * largest(x, 0.3) for weight, x in zip([1, -2], whole, strict=True))
    found = torch.cat([delta(merged, module).flatten() for module in SHAPES])
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    apart = merge(tasks, method="magnitude", weights=[1, -2], options={"density": 0.3, "space": "dense"})
    assert not torch.allclose(torch.cat([delta(apart, module).flatten() for module in SHAPES]), found, atol=1e-3)


@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("space", ["b", "dense"])
def test_files_give_the_same_bytes_in_any_number_of_ranges(tmp_path: Path, method: str, space: str) -> None:
    paths = [tmp_path / f"task{place}.safetensors" for place in range(3)]
    for place, path in enumerate(paths):
        generator = torch.Generator().manual_seed(place)
        entries = {
            module: random_entries(2 * shape[0], 0.6, generator, torch.float32) for module, shape in SHAPES.items()
        }
        entries = {m: Entries(index=e.index, values=e.values.round()) for m, e in entries.items()}  # many are equal
        native.save(adapter(block(path.stem, seed=4, entries=entries)), path)
    options: dict[str, Any] = {"density": 0.3, "space": space, **MODEL}
    made = merge([native.load(path) for path in paths], method=method, options=options)
    native.save(made, tmp_path / "wanted")
    for num_ranges in (1, 3):
        merge_files(paths, tmp_path / "found", method=method, options=options, num_ranges=num_ranges)
        assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_entries_of_b_and_of_updates_are_never_compared() -> None:
    shared = "layers.0.q_proj", "layers.0.up_proj"
    tasks = [
        adapter(block("a", seed=1, modules=[*shared, "layers.1.q_proj"]), modules=[*shared, "layers.1.q_proj"]),
        adapter(block("b", seed=2, modules=["layers.1.q_proj"]), modules=["layers.1.q_proj"]),
    ]
    message = (
        r"layers\.1\.q_proj: the tasks do not share A, in layers\.0\.\w+ they do.*; merge with space=dense, or with"
    )
    with pytest.raises(AdapterError, match=message):
        merge(tasks, method="ties", options=MODEL)
    merge(tasks, method="ties", options={"space": "dense", **MODEL})
