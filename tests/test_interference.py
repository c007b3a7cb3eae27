"""The interference of adapters: its numbers against dense float64 updates, and its laws."""

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lori_dist.interference
from lori_dist import Adapter, AdapterError, Entries
from lori_dist.adapter.targets import place
from lori_dist.interference import interference
from lori_dist.merges import merge
from tests.merges.made import SHAPES, adapter, adapters, block, delta

NEAR = 1e-9


def dense(what: Adapter, module: str) -> Tensor:
    return delta(what, module) if module in what.shapes else torch.zeros(SHAPES[module], dtype=torch.float64)


def norm(*updates: Tensor) -> float:
    return math.sqrt(sum(float(update.square().sum()) for update in updates))


def inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())


def row_projector(x: Tensor) -> Tensor:
    return torch.linalg.pinv(x, rtol=1e-9) @ x


def modules_of(*them: Adapter) -> list[str]:
    return [module for module in SHAPES if any(module in one.shapes for one in them)]


def same(found: float | None, wanted: float) -> None:
    assert found is not None
    assert found == pytest.approx(wanted, rel=NEAR, abs=NEAR)


def check_pair(found: dict[str, Any], s: Adapter, t: Adapter, modules: list[str]) -> None:
    """Of figures over some modules, against the dense formulas."""
    pairs = [(dense(s, module), dense(t, module)) for module in modules]
    norms = norm(*(one for one, _ in pairs)), norm(*(other for _, other in pairs))
    if not all(norms):
        assert found["cosine"]["value"] is None
        return
    cosine = sum(inner(*pair) for pair in pairs) / math.prod(norms)
    same(found["cosine"]["value"], cosine)
    assert abs(cosine) <= found["cosine"]["bound"] + NEAR <= 1 + 2 * NEAR
    for side in (0, 1):
        energies = [(pair[side] @ row_projector(pair[1 - side])).square().sum() for pair in pairs]
        same(found["energy"]["input"][side], float(sum(energies)) / norms[side] ** 2)
        energies = [(row_projector(pair[1 - side].t()) @ pair[side]).square().sum() for pair in pairs]
        same(found["energy"]["output"][side], float(sum(energies)) / norms[side] ** 2)
        for space in ("input", "output"):
            assert cosine**2 <= found["energy"][space][side] + NEAR


# --- numbers ---------------------------------------------------------------------------------------------------------


@given(made=adapters(3))
def test_figures_are_those_of_the_dense_updates(made: list[Adapter]) -> None:
    report = interference(made)
    names = [one["name"] for one in report["adapters"]]
    for pair, (s, t) in zip(report["pairs"], itertools.combinations(range(3), 2), strict=True):
        assert pair["adapters"] == [names[s], names[t]]
        check_pair(pair["overall"], made[s], made[t], modules_of(made[s], made[t]))
        for module, figures in pair["modules"].items():
            check_pair(figures, made[s], made[t], [module])
        for layer, figures in pair["layers"].items():
            within = [module for module in modules_of(made[s], made[t]) if place(module)[0] == layer]
            check_pair(figures, made[s], made[t], within)
    for name, one in zip(names, made, strict=True):
        for module in report["modules"]:
            same(report["modules"][module]["norms"][name], norm(dense(one, module)))
    json.dumps(report, allow_nan=False)


def test_several_blocks_and_a_stored_projection_are_one_update() -> None:
    tasks = [adapter(block("one")), adapter(block("two", seed=1, rank=3)), adapter(block("three", seed=2, draw=4))]
    concat = merge(tasks[:2], method="concat", weights=[0.7, -0.4])
    stored = merge(tasks, method="svd", weights=[1.0, 1.0, 1.0], options={"rank": 2})
    assert (len(concat.blocks), stored.blocks[0].seed) == (2, None)
    report = interference([*tasks, concat, stored])
    everything = [*tasks, concat, stored]
    for pair, (s, t) in zip(report["pairs"], itertools.combinations(range(5), 2), strict=True):
        check_pair(pair["overall"], everything[s], everything[t], list(SHAPES))
    with_stored = report["pairs"][-1]["overall"]
    assert with_stored["cosine"]["expected"] is with_stored["cosine"]["std"] is None
    in_concat = report["pairs"][2]["overall"]  # the first task, and the merge that it is a block of
    assert report["pairs"][2]["adapters"] == ["one", "one+two"]
    assert in_concat["cosine"]["std"] is None
    assert in_concat["cosine"]["expected"] > 0
    assert in_concat["support"]["share"][0] == 1.0


def test_the_same_projection_in_two_blocks_is_one() -> None:
    both = adapter(block("one"), block("more", draw=5))
    other = adapter(block("other", seed=3))
    [pair] = interference([both, other])["pairs"]
    check_pair(pair["overall"], both, other, list(SHAPES))


def test_theory_of_independent_projections() -> None:
    s, t = adapter(block("s")), adapter(block("t", seed=1, draw=1))
    [pair] = interference([s, t])["pairs"]
    for module, figures in pair["modules"].items():
        b = [part.blocks[0].entries[module].dense(SHAPES[module][0], 2) for part in (s, t)]
        wanted = float((b[0].t() @ b[1]).norm() / (b[0].norm() * b[1].norm()))
        same(figures["cosine"]["std"], wanted / math.sqrt(SHAPES[module][1]))
        same(figures["cosine"]["cap"], 1 / math.sqrt(SHAPES[module][1]))
        assert figures["cosine"]["expected"] == 0.0
        rows = [torch.linalg.qr(part.blocks[0].projection(module, SHAPES[module][1]).double().t()).Q for part in (s, t)]
        same(figures["cosine"]["bound"], float(torch.linalg.matrix_norm(rows[0].t() @ rows[1], 2)))
    over_all = pair["overall"]["cosine"]
    assert 0 < over_all["std"] <= over_all["cap"] <= 1 / math.sqrt(5)


def test_the_standard_deviation_is_that_of_many_draws() -> None:
    shape, rank, generator = (20, 256), 8, torch.Generator().manual_seed(0)
    entries = [
        {"m": Entries(index=None, values=torch.randn(20 * rank, generator=generator, dtype=torch.float64))}
        for _ in range(2)
    ]
    cosines = []
    for draw in range(150):
        made = [
            Adapter(
                shapes={"m": shape},
                blocks=(block(str(side), seed=2 * draw + side, rank=rank, modules=(), entries=entries[side]),),
                targets="m",
            )
            for side in (0, 1)
        ]
        [pair] = interference(made)["pairs"]
        cosines.append(pair["overall"]["cosine"])
    values = torch.tensor([cosine["value"] for cosine in cosines])
    std = cosines[0]["std"]
    assert float(values.std()) == pytest.approx(std, rel=0.2)
    assert abs(float(values.mean())) < 4 * std / math.sqrt(150)


def test_overlap_of_supports() -> None:
    def kept(*places: int) -> dict[str, Entries]:
        index = torch.tensor(places, dtype=torch.int32)
        return {"layers.0.q_proj": Entries(index=index, values=torch.ones(len(places)))}

    narrow = adapter(block("narrow", rank=2, entries=kept(0, 1, 5, 8)))  # (0,0) (0,1) (2,1) (4,0)
    wide = adapter(block("wide", rank=3, seed=1, entries=kept(0, 2, 7, 12, 13)))  # (0,0) (0,2) (2,1) (4,0) (4,1)
    [pair] = interference([narrow, wide])["pairs"]
    support = pair["overall"]["support"]
    assert support == {
        "kept": [4, 5],
        "common": 3,
        "expected": pytest.approx(4 * 5 / (6 * 3)),
        "share": [3 / 4, 3 / 5],
        "jaccard": 1 / 2,
    }
    assert list(pair["modules"]) == ["layers.0.q_proj"]


def test_signs_on_a_shared_projection_are_those_of_b() -> None:
    s, t = adapter(block("s")), adapter(block("t", draw=3))
    [pair] = interference([s, t])["pairs"]
    products = [
        s.blocks[0].entries[module].dense(out, 2) * t.blocks[0].entries[module].dense(out, 2)
        for module, (out, _) in SHAPES.items()
    ]
    signs = pair["overall"]["signs"]
    assert signs["on"] == "B"
    assert signs["compared"] == sum(int((product != 0).sum()) for product in products) > 0
    assert signs["conflicts"] == sum(int((product < 0).sum()) for product in products) > 0
    assert signs["share"] == signs["conflicts"] / signs["compared"]


@pytest.mark.parametrize("chunk", [1, 12, 1 << 20])
def test_signs_elsewhere_are_those_of_the_updates(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lori_dist.interference, "_CHUNK", chunk)
    s, t = adapter(block("s")), adapter(block("t", seed=1))
    [pair] = interference([s, t])["pairs"]
    products = [delta(s, module) * delta(t, module) for module in SHAPES]
    signs = pair["overall"]["signs"]
    assert (signs["on"], signs["entries"]) == ("update", signs["total"])
    assert signs["compared"] == sum(int((product != 0).sum()) for product in products)
    assert signs["conflicts"] == sum(int((product < 0).sum()) for product in products)


def test_of_large_updates_evenly_spread_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lori_dist.interference, "SIGN_ENTRIES", 15)
    s, t = adapter(block("s")), adapter(block("t", seed=1))
    [pair] = interference([s, t])["pairs"]
    signs = pair["modules"]["layers.0.q_proj"]["signs"]
    product = (delta(s, "layers.0.q_proj") * delta(t, "layers.0.q_proj"))[[0, 2, 4]]
    assert (signs["entries"], signs["total"]) == (15, 30)
    assert (signs["compared"], signs["conflicts"]) == (int((product != 0).sum()), int((product < 0).sum()))


def test_norms_by_layer_and_projection() -> None:
    made = adapter(block("task"))
    report = interference([made])
    assert (report["layers"], report["projections"]) == (["layers.0", "layers.1"], ["q_proj", "up_proj"])
    norms = report["norms"]["task"]
    each = [[norm(delta(made, f"{layer}.{name}")) for name in report["projections"]] for layer in report["layers"]]
    assert norms["table"] == [pytest.approx(row) for row in each]
    same(norms["layers"]["layers.1"], math.hypot(*each[1]))
    same(norms["projections"]["q_proj"], math.hypot(each[0][0], each[1][0]))
    same(report["adapters"][0]["norm"], norm(*(delta(made, module) for module in SHAPES)))
    assert report["pairs"] == []


# --- laws ------------------------------------------------------------------------------------------------------------


@given(made=adapters(1))
def test_an_adapter_is_one_with_itself(made: list[Adapter]) -> None:
    report = interference([made[0], made[0]])
    assert [one["name"] for one in report["adapters"]] == ["task0", "task0-2"]
    figures = report["pairs"][0]["overall"]
    if figures["cosine"]["value"] is None:
        assert not any(part.entries for part in made[0].blocks)
        return
    for found in (figures["cosine"]["value"], figures["cosine"]["bound"], *figures["energy"]["input"]):
        same(found, 1.0)
    assert (figures["support"]["share"], figures["signs"]["share"]) == ([1.0, 1.0], 0.0)


def test_disjoint_rows_of_b_on_a_shared_projection_are_exactly_orthogonal() -> None:
    def rows(first: int) -> dict[str, Entries]:
        generator = torch.Generator().manual_seed(first)
        return {
            module: Entries(
                index=torch.tensor(
                    [row * 2 + column for row in range(first, out, 2) for column in (0, 1)], dtype=torch.int32
                ),
                values=torch.randn(2 * len(range(first, out, 2)), generator=generator),
            )
            for module, (out, _) in SHAPES.items()
        }

    [pair] = interference([adapter(block("even", entries=rows(0))), adapter(block("odd", entries=rows(1)))])["pairs"]
    assert pair["overall"]["cosine"]["value"] == 0.0
    assert pair["overall"]["cosine"]["expected"] == 0.0
    assert pair["overall"]["energy"]["output"] == [0.0, 0.0]
    assert pair["overall"]["support"]["common"] == pair["overall"]["signs"]["compared"] == 0
    assert pair["overall"]["signs"]["share"] is None


@given(factor=st.sampled_from([0.01, 2.0, 300.0]), seed=st.integers(0, 1))
def test_scale_changes_norms_only(factor: float, seed: int) -> None:
    s, t = adapter(block("s")), adapter(block("t", seed=seed, draw=1))
    scaled = adapter(block("t", seed=seed, draw=1, weight=factor))
    one, other = interference([s, t]), interference([s, scaled])
    for space in ("cosine", "energy", "signs", "support"):
        flat, wanted = (list(leaves(found["pairs"][0]["overall"][space])) for found in (other, one))
        assert flat == [value if value is None else pytest.approx(value, rel=NEAR, abs=NEAR) for value in wanted]
    same(other["adapters"][1]["norm"], factor * one["adapters"][1]["norm"])


@given(made=adapters(3), order=st.permutations([0, 1, 2]))
def test_the_order_of_adapters_changes_nothing_else(made: list[Adapter], order: list[int]) -> None:
    names = ["a", "b", "c"]
    one = {tuple(pair["adapters"]): pair["overall"] for pair in interference(made, names=names)["pairs"]}
    other = interference([made[place] for place in order], names=[names[place] for place in order])
    for pair in other["pairs"]:
        s, t = pair["adapters"]
        wanted = one.get((s, t)) or turned(one[t, s])
        flat = [value if value is None else pytest.approx(value, rel=1e-6, abs=NEAR) for value in leaves(wanted)]
        assert list(leaves(pair["overall"])) == flat


def turned(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        space: {name: value[::-1] if isinstance(value, list) else value for name, value in found.items()}
        for space, found in figures.items()
    }


def leaves(tree: Any) -> Any:
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, dict | list):
            yield from leaves(item)
        elif not isinstance(item, str):
            yield item


def test_adapters_of_different_modules_have_nothing_in_common() -> None:
    s = adapter(block("s", modules=["layers.0.q_proj"]), modules=["layers.0.q_proj"])
    t = adapter(block("t", modules=["layers.1.q_proj"]), modules=["layers.1.q_proj"])
    [pair] = interference([s, t])["pairs"]
    assert (pair["layers"], pair["modules"]) == ({}, {})
    assert pair["overall"]["cosine"]["value"] == 0.0
    assert pair["overall"]["energy"] == {"input": [0.0, 0.0], "output": [0.0, 0.0]}


def test_an_adapter_that_keeps_nothing_has_no_cosine() -> None:
    report = interference([adapter(block("s")), adapter(block("t", entries={}))])
    assert report["pairs"][0]["overall"]["cosine"]["value"] is None
    json.dumps(report, allow_nan=False)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_no_adapters_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"^interference: got no adapters; give at least one$"):
        interference([])


def test_names_must_differ() -> None:
    with pytest.raises(AdapterError, match=r"got 2 names \(a, a\) for 2 adapters"):
        interference([adapter(block()), adapter(block())], names=["a", "a"])


def test_other_shapes_and_bases_are_refused() -> None:
    one, other = adapter(block("s"), base={"weights": "1"}), adapter(block("t"), base={"weights": "2"})
    with pytest.raises(
        AdapterError, match=r"^interference: s was trained on a base model with weights 1, t on one with"
    ):
        interference([one, other])
    strange = Adapter(shapes={"layers.0.q_proj": (9, 5)}, blocks=(block("x", modules=()),), targets="x")
    with pytest.raises(
        AdapterError, match=r"^layers\.0\.q_proj: s was trained on a weight of shape \(6, 5\), x on \(9"
    ):
        interference([adapter(block("s")), strange])


def test_a_damaged_projection_is_refused() -> None:
    made = block("s")
    wrong = {**made.checksums, "layers.0.q_proj": "0" * 16}
    damaged = adapter(dataclasses.replace(made, checksums=wrong))
    with pytest.raises(AdapterError, match=r"^layers\.0\.q_proj: A made from seed 0 has checksum"):
        interference([damaged, adapter(block("t", seed=1))])
