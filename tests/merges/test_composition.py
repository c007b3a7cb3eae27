"""Concat merges are taken apart and put together again without computing anything."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lori_dist import merges
from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import ConfigError
from lori_dist.formats import native
from lori_dist.formats.native import save
from tests.merges.made import SHAPES, adapter, block, delta

concat = functools.partial(merges.merge, method="concat")
NAMES = ["nlu", "math", "code", "safety"]


@pytest.fixture
def four() -> list[Adapter]:
    return [adapter(block(name, seed=seed, draw=seed)) for seed, name in enumerate(NAMES)]


def same(one: Adapter, other: Adapter) -> bool:
    """To the bit, and the very same entries."""
    return one.shapes == other.shapes and all(
        (a.name, a.seed, a.alpha, a.weight, a.checksums) == (b.name, b.seed, b.alpha, b.weight, b.checksums)
        and a.entries.keys() == b.entries.keys()
        and all(a.entries[module] is b.entries[module] for module in a.entries)
        for a, b in zip(one.blocks, other.blocks, strict=True)
    )


def test_a_dropped_task_was_never_there(four: list[Adapter]) -> None:
    merged = concat(four, weights=[0.4, 0.3, 0.2, 0.1])
    assert same(merges.drop(merged, "math"), concat([four[0], *four[2:]], weights=[0.4, 0.2, 0.1]))
    assert same(merges.drop(merged, "nlu", "safety"), concat(four[1:3], weights=[0.3, 0.2]))


def test_a_reweighted_task_has_the_new_weight(four: list[Adapter]) -> None:
    merged = concat(four, weights=[0.4, 0.3, 0.2, 0.1])
    again = merges.reweight(merged, {"math": -1.5, "nlu": 0.0})
    assert same(again, concat(four, weights=[0.0, -1.5, 0.2, 0.1]))
    wanted = (
        delta(merged, "layers.0.q_proj")
        - 1.8 * delta(four[1], "layers.0.q_proj")
        - 0.4 * delta(four[0], "layers.0.q_proj")
    )
    assert torch.allclose(delta(again, "layers.0.q_proj"), wanted, rtol=0, atol=1e-12)


def test_an_added_task_changes_nothing_of_the_others(four: list[Adapter]) -> None:
    merged = concat([concat(four[:3], weights=[0.4, 0.3, 0.2]), four[3]], weights=[1.0, 0.1])
    assert same(merged, concat(four, weights=[0.4, 0.3, 0.2, 0.1]))


def test_on_one_a_a_task_is_added_only_where_it_adapts() -> None:
    tasks = [adapter(block(name, draw=place)) for place, name in enumerate(NAMES[:2])]
    few = ["layers.0.q_proj"]
    new = adapter(block("new", modules=few, draw=7), modules=few)
    merged = merges.merge(tasks, method="linear", weights=[0.5, 0.5])
    added = merges.merge([merged, new], method="linear", weights=[1.0, 0.3])
    for module in SHAPES:
        untouched = added.blocks[0].entries[module] is merged.blocks[0].entries[module]
        assert untouched == (module not in few)
        wanted = merges.merge([*tasks, new], method="linear", weights=[0.5, 0.5, 0.3])
        assert torch.allclose(delta(added, module), delta(wanted, module), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda merged: merges.drop(merged, "mth"),
            r"^merge\.method\.drop: unknown component 'mth'; there are nlu, math, code, safety\. Did you mean 'math'\?",
        ),
        (lambda merged: merges.reweight(merged, {"x": 1.0}), r"^merge\.method\.reweight: unknown component 'x'"),
        (
            lambda merged: merges.drop(merged, *NAMES),
            r"^merge\.method\.drop: nlu, math, code, safety are all " r"components",
        ),
        (
            lambda merged: merges.reweight(merged, {"nlu": math.inf}),
            r"^merge\.method\.reweight\.nlu: got inf; give a finite number",
        ),
    ],
)
def test_mistakes_are_named(four: list[Adapter], change: Callable[[Adapter], Adapter], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change(concat(four))


def test_a_file_is_taken_apart_by_the_command(four: list[Adapter], tmp_path: Path) -> None:
    four = [adapter(block(name, seed=seed, values_dtype=torch.float32)) for seed, name in enumerate(NAMES)]
    save(concat(four), tmp_path / "all")
    words = ["merge", str(tmp_path / "less"), str(tmp_path / "all"), "--method", "concat"]
    assert main([*words, "drop=[math, code]", "reweight={nlu: 0.9}"]) == 0
    save(concat([four[0], four[3]], weights=[0.9, 0.25]), tmp_path / "wanted")
    assert (tmp_path / "less").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert [part.name for part in native.load(tmp_path / "less").blocks] == ["nlu", "safety"]


def test_four_tasks_take_at_most_four_files_and_a_little(tmp_path: Path) -> None:
    """Of a size at which tensors, not names, are what a file holds."""
    from tests.formats.test_native import sparse

    shapes = {f"model.layers.{i}.self_attn.{name}_proj": (128, 128) for i in range(4) for name in "qkvo"}
    one = sparse(shapes, 16, 0.1)
    save(one, tmp_path / "one")
    save(concat([one] * 4), tmp_path / "four")
    assert (tmp_path / "four").stat().st_size <= 4.1 * (tmp_path / "one").stat().st_size
