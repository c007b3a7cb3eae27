"""What holds for every merge, found as the configuration finds it."""

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lori_dist import merges, plugin
from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.adapter.projection import checksum
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.formats import native
from lori_dist.integrations import peft
from tests.merges.made import SHAPES, WEIGHTS, adapter, adapters, block, delta

Merge = Callable[..., Adapter]


@pytest.fixture(params=plugin.names("merges"))
def method(request: pytest.FixtureRequest) -> plugin.Method:
    return plugin.find("merges", request.param, "merge", "merge.method")


NEUTRAL: dict[str, object] = {"density": 1.0, "flatten": 0.0}
"""Values of options at which a method drops and changes nothing of a single task."""


@pytest.fixture
def merge(method: plugin.Method) -> Merge:
    neutral = {name: value for name, value in NEUTRAL.items() if name in method.options}
    return functools.partial(merges.merge, method=method.name, options=neutral)


@pytest.fixture(params=["one A each", "one A for all"])
def three(request: pytest.FixtureRequest) -> list[Adapter]:
    if request.param == "one A each":
        return [adapter(block(f"task{place}", seed=place, draw=place)) for place in range(3)]
    return [adapter(block(f"task{place}", seed=5, rank=3, draw=place)) for place in range(3)]


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.allclose(delta(one, module), delta(other, module), rtol=0, atol=1e-12) for module in SHAPES)


def test_the_signature_is_the_one_documented(method: plugin.Method) -> None:
    merge = method.load()
    first, *others = inspect.signature(merge).parameters.values()
    assert first.name == "updates"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    assert [parameter.name for parameter in others if parameter.default is inspect.Parameter.empty] == ["weights"]
    assert merge.__doc__ is not None and merge.__doc__.strip()


def test_the_same_inputs_give_the_same_bits(merge: Merge, three: list[Adapter]) -> None:
    first, second = (merge(three, weights=[0.5, -0.2, 1.0]) for _ in range(2))
    assert [part.name for part in first.blocks] == [part.name for part in second.blocks]
    for one, other in zip(first.blocks, second.blocks, strict=True):
        assert one.entries.keys() == other.entries.keys()
        assert all(torch.equal(one.entries[module].values, other.entries[module].values) for module in one.entries)


def test_the_inputs_stay_as_they_are(merge: Merge, three: list[Adapter]) -> None:
    before = [[values.clone() for values in every_value(adapter)] for adapter in three]
    merge(three, weights=[0.5, -0.2, 1.0])
    for adapter_, values in zip(three, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(every_value(adapter_), values, strict=True))


def every_value(adapter: Adapter) -> list[torch.Tensor]:
    return [entries.values for part in adapter.blocks for entries in part.entries.values()]


def test_one_adapter_at_weight_one_comes_back(merge: Merge, three: list[Adapter]) -> None:
    merged = merge(three[:1], weights=[1.0])
    assert same(merged, three[0])
    assert (merged.shapes, merged.targets) == (three[0].shapes, three[0].targets)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_order_of_tasks_does_not_matter(method: plugin.Method, three: list[Adapter], density: float) -> None:
    options = {"density": density} if "density" in method.options else {}
    merge = functools.partial(merges.merge, method=method.name, options=options)
    merged = merge(three, weights=[0.5, -0.2, 1.0])
    turned = merge([three[2], three[0], three[1]], weights=[1.0, 0.5, -0.2])
    assert same(merged, turned)
    assert merged.shapes == turned.shapes


def test_the_order_of_modules_does_not_matter(method: plugin.Method, three: list[Adapter]) -> None:
    merge = functools.partial(merges.merge, method=method.name, weights=[0.5, -0.2, 1.0])
    turned = [dataclasses.replace(part, shapes=dict(reversed(part.shapes.items()))) for part in three]
    merged, other = merge(three), merge(turned)
    assert list(merged.shapes) == list(reversed(other.shapes))
    assert all(torch.equal(delta(merged, module), delta(other, module)) for module in SHAPES)


def test_a_module_is_merged_as_if_there_were_no_other(method: plugin.Method, three: list[Adapter]) -> None:
    merge = functools.partial(merges.merge, method=method.name, weights=[0.5, -0.2, 1.0])
    few = [dataclasses.replace(part, shapes={"layers.1.up_proj": SHAPES["layers.1.up_proj"]}) for part in three]
    assert torch.equal(delta(merge(few), "layers.1.up_proj"), delta(merge(three), "layers.1.up_proj"))


# At the default options, whatever they drop, A is what it was.


def test_a_stays_as_it_was(method: plugin.Method, three: list[Adapter]) -> None:
    merged = merges.merge(three, method=method.name, weights=[0.5, -0.2, 1.0])
    known = {part.seed: part for adapter_ in three for part in adapter_.blocks}
    for part in merged.blocks:
        if part.seed is None:
            assert all(checksum(part.projections[module]) == part.checksums[module] for module in part.entries)
        else:
            assert (part.rank, part.dtype) == (known[part.seed].rank, known[part.seed].dtype)
            assert part.checksums == known[part.seed].checksums


@pytest.fixture
def on_one_a() -> list[Adapter]:
    return [adapter(block(f"task{place}", seed=5, rank=3, draw=place, density=0.3)) for place in range(3)]


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_tasks_on_one_a_merge_to_b_on_that_a(method: plugin.Method, on_one_a: list[Adapter], density: float) -> None:
    options = {"density": density} if "density" in method.options else {}
    merged = merges.merge(on_one_a, method=method.name, options=options, weights=[0.5, -0.2, 1.0])
    assert {part.seed for part in merged.blocks} == {5}
    assert {part.rank for part in merged.blocks} == {3}
    for module, (_, in_features) in SHAPES.items():
        a = merged.blocks[0].projection(module, in_features).double()
        outside = torch.eye(in_features, dtype=torch.float64) - torch.linalg.pinv(a) @ a
        assert (delta(merged, module) @ outside).abs().max() < 1e-12


SPARSE = {
    *("concat", "linear", "task_arithmetic", "magnitude", "ties", "dare", "dare_ties", "peft_linear"),
    *("della", "breadcrumbs", "sce"),
}


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_what_is_sparse_on_one_a_stays_in_the_union_of_supports(name: str, on_one_a: list[Adapter]) -> None:
    merged = merges.merge(on_one_a, method=name, weights=[0.5, -0.2, 1.0])
    for module in SHAPES:
        union = {place for part in on_one_a for place in places(part, module)}
        assert places(merged, module) <= union
        assert len(union) < SHAPES[module][0] * 3


def places(what: Adapter, module: str) -> set[int]:
    indices = [part.entries[module].index for part in what.blocks if module in part.entries]
    assert None not in indices
    return {place for index in indices for place in index.tolist()}  # type: ignore[union-attr]


def test_a_task_of_two_blocks_is_their_sum(merge: Merge) -> None:
    both = adapter(block("a"), block("b", seed=1, draw=1, weight=-0.5))
    merged = merge([both], weights=[1.0])
    assert same(merged, both)


def test_only_the_product_of_b_and_scale_counts(merge: Merge, three: list[Adapter]) -> None:
    """As between alpha / rank and rsLoRA's alpha / sqrt(rank): the scale is part of the update, and counts once."""

    def with_scale(what: Adapter, factor: float) -> Adapter:
        (part,) = what.blocks
        entries = {
            module: dataclasses.replace(kept, values=kept.values / factor) for module, kept in part.entries.items()
        }
        return dataclasses.replace(
            what, blocks=(dataclasses.replace(part, alpha=part.alpha * factor, entries=entries),)
        )

    factor = math.sqrt(three[0].blocks[0].rank)
    merged = merge([with_scale(what, factor) for what in three], weights=[0.5, -0.2, 1.0])
    assert same(merged, merge(three, weights=[0.5, -0.2, 1.0]))
    assert same(merge([with_scale(three[0], factor)], weights=[1.0]), three[0])


def test_a_module_of_one_task_alone_comes_back(merge: Merge, three: list[Adapter]) -> None:
    few = ["layers.1.q_proj"]
    alone = adapter(block("alone", seed=8, rank=3, draw=9, modules=few), modules=few, targets=("q_proj",))
    (part,) = three[0].blocks
    others = [module for module in SHAPES if module not in few]
    rest = adapter(block("rest", seed=part.seed or 0, rank=3, draw=1, modules=others), modules=others)
    merged = merge([alone, rest], weights=[1.0, 1.0])
    assert set(merged.shapes) == set(SHAPES)
    assert torch.allclose(delta(merged, few[0]), delta(alone, few[0]), rtol=0, atol=1e-12)
    assert all(torch.allclose(delta(merged, module), delta(rest, module), rtol=0, atol=1e-12) for module in others)


def test_tasks_that_keep_nothing_somewhere_or_anywhere(merge: Merge, tmp_path: Path) -> None:
    full = block("full", seed=0, rank=2)
    part = block("part", seed=1, rank=2, entries={"layers.0.q_proj": full.entries["layers.0.q_proj"]})
    none = block("none", seed=2, rank=2, entries={})
    merged = merge([adapter(full), adapter(part), adapter(none)], weights=[1.0, 1.0, 1.0])
    assert torch.allclose(delta(merged, "layers.1.q_proj"), delta(adapter(full), "layers.1.q_proj"), rtol=0, atol=1e-12)
    empty = merge([adapter(none), adapter(none)], weights=[1.0, -1.0])
    assert not any(delta(empty, module).any() for module in SHAPES)
    for number, made in enumerate((merged, empty)):
        native.save(made, tmp_path / str(number))
        assert all(
            torch.allclose(delta(native.load(tmp_path / str(number)), module), delta(made, module), rtol=0, atol=1e-5)
            for module in SHAPES
        )


def test_a_weight_of_zero_takes_a_task_out(merge: Merge, three: list[Adapter]) -> None:
    merged = merge(three[:1], weights=[0.0])
    assert not any(delta(merged, module).any() for module in SHAPES)


def test_values_in_fp32_stay_in_fp32(merge: Merge) -> None:
    three = [adapter(block(f"t{seed}", seed=seed, draw=seed, values_dtype=torch.float32)) for seed in range(3)]
    exact = [adapter(block(f"t{seed}", seed=seed, draw=seed, values_dtype=torch.float64)) for seed in range(3)]
    merged, wanted = (merge(parts, weights=[0.5, -0.2, 1.0]) for parts in (three, exact))
    for part in merged.blocks:
        assert {kept.values.dtype for kept in part.entries.values()} == {torch.float32}
        assert all(a.dtype == part.dtype == torch.float32 for a in part.projections.values())
    assert all(torch.allclose(delta(merged, module), delta(wanted, module), rtol=0, atol=1e-4) for module in SHAPES)


def test_the_file_of_a_merge_has_its_update(merge: Merge, three: list[Adapter], tmp_path: Path) -> None:
    merged = merge(three, weights=[0.5, -0.2, 1.0])
    native.save(merged, tmp_path / "merged")
    loaded = native.load(tmp_path / "merged")
    assert all(torch.allclose(delta(loaded, module), delta(merged, module), rtol=0, atol=1e-5) for module in SHAPES)
    first, second = ((tmp_path / "merged").read_bytes(), tmp_path / "again")
    native.save(merge(three, weights=[0.5, -0.2, 1.0]), second)
    assert second.read_bytes() == first


def test_a_merge_can_be_merged_again(merge: Merge, three: list[Adapter]) -> None:
    merged = merge(three, weights=[0.5, -0.2, 1.0])
    doubled = merges.merge([merged, three[0]], method="linear", weights=[2.0, 1.0])
    for module in SHAPES:
        wanted = 2 * delta(merged, module) + delta(three[0], module)
        assert torch.allclose(delta(doubled, module), wanted, rtol=0, atol=1e-12)


def test_a_peft_folder_of_a_merge_has_its_update(merge: Merge, three: list[Adapter], tmp_path: Path) -> None:
    merged = merge(three, weights=[0.5, -0.2, 1.0])
    peft.export(merged, tmp_path / "out", base_model_name="base")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for module in SHAPES:
        a, b = (tensors[f"base_model.model.{module}.lora_{kind}.weight"].double() for kind in "AB")
        assert a.shape[0] == b.shape[1] == about["r"]
        update = about["lora_alpha"] / about["r"] * b @ a
        assert torch.allclose(update, delta(merged, module), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shared=st.booleans())
def test_any_one_adapter_at_weight_one_comes_back(merge: Merge, data: st.DataObject, shared: bool) -> None:
    (part,) = data.draw(adapters(1, shared=shared))
    merged = merge([part], weights=[1.0])
    assert all(torch.allclose(delta(merged, module), delta(part, module), rtol=0, atol=1e-10) for module in SHAPES)


MEANS: list[tuple[str, dict[str, object]]] = [
    ("ties", {"density": 1.0}),
    ("ties", {"density": 1.0, "space": "dense"}),
    ("ties", {"density": 1.0, "divide": "weight"}),
    ("ties", {"density": 1.0, "elect": "frequency"}),
    ("dare_ties", {"density": 1.0}),
    ("knots", {"density": 1.0, "tolerance": 0.0}),
    ("knots", {"density": 1.0, "tolerance": 0.0, "inner": "dare_ties"}),
    ("tsv", {}),
    ("core_space", {"inner": "ties"}),
    ("core_space", {"inner": "dare_ties"}),
    ("core_space", {"inner": "tsv"}),
    ("della", {"density": 1.0}),
    ("breadcrumbs", {"density": 1.0, "inner": "ties"}),
    ("sce", {}),
    ("compress", {"inner": "ties"}),
]
"""Methods whose papers take the mean of equal tasks, with options at which nothing is dropped."""


@pytest.mark.parametrize(("name", "options"), MEANS)
@settings(max_examples=10, deadline=None)
@given(number=st.integers(2, 4), draw=st.integers(0, 10**6), has_patterns=st.booleans())
def test_equal_adapters_merge_to_one_of_them(
    name: str, options: dict[str, object], number: int, draw: int, has_patterns: bool
) -> None:
    """Their updates have rank 1 on an A of rank 4, so that the directions of all find room in it."""
    modules = ["layers.0.up_proj", "layers.1.q_proj"]
    generator = torch.Generator().manual_seed(draw)

    def b(num_rows: int) -> Entries:
        column, row = torch.randn(num_rows, 1, generator=generator), torch.randn(1, 4, generator=generator)
        return Entries(index=None, values=(column @ row).flatten().double())

    entries = {module: b(SHAPES[module][0]) for module in modules}
    one = adapter(block("a", rank=4, modules=modules, entries=entries), modules=modules)
    weights: list[merges.Weight] | None = [{"layers.0": 1.0}] * number if has_patterns else None
    merged = merges.merge([one] * number, method=name, options=options, weights=weights)
    for module in modules:
        torch.testing.assert_close(delta(merged, module), delta(one, module), rtol=0, atol=1e-5)


def test_what_declares_to_be_the_sum_is_the_sum() -> None:
    declared = {name for name in plugin.names("merges") if found(name).declares("EXACT", EXACT.get(name, {}))}
    assert declared == set(EXACT)
    assert not found("dare").declares("EXACT", {"density": 0.5})
    assert not found("concat").declares("EXACT", {"drop": ("a",)})


def found(name: str) -> plugin.Method:
    return plugin.find("merges", name, "merge", "merge.method")


EXACT: dict[str, dict[str, object]] = {
    "concat": {},
    "linear": {},
    "task_arithmetic": {},
    "magnitude": {"density": 1.0},
    "dare": {"density": 1.0},
    "della": {"inner": "task_arithmetic", "density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "svd": {},
    "knots": {"inner": "task_arithmetic", "density": 1.0, "tolerance": 0.0},
    "core_space": {"inner": "task_arithmetic", "density": 1.0},
}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), number=st.integers(1, 4), shared=st.sampled_from([True, False, None]))
def test_what_is_a_sum_is_the_exact_sum(name: str, data: st.DataObject, number: int, shared: bool | None) -> None:
    parts = data.draw(adapters(number, shared=shared))
    weights = data.draw(st.lists(WEIGHTS, min_size=number, max_size=number))
    merged = merges.merge(parts, method=name, options=EXACT[name], weights=weights)
    for module in SHAPES:
        wanted = sum(weight * delta(part, module) for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-10)


AVERAGES: dict[str, dict[str, object]] = {**EXACT, "compress": {}, "cp": {}, "do_merging": {"steps": 0}}


@pytest.mark.parametrize("name", sorted(AVERAGES))
def test_equal_weights_do_not_scale_with_the_number_of_tasks(name: str) -> None:
    one = adapter(block("a", rank=3))
    merged = merges.merge([one] * 4, method=name, options=AVERAGES[name])
    assert same(merged, one)


def test_a_merge_has_all_checksums_of_a(merge: Merge) -> None:
    one = adapter(block("a", modules=["layers.0.q_proj"]), modules=["layers.0.q_proj"])
    other = adapter(block("b", seed=1, modules=["layers.1.up_proj"]), modules=["layers.1.up_proj"])
    merged = merge([one, other], weights=[1, 1])
    assert list(merged.shapes) == ["layers.0.q_proj", "layers.1.up_proj"]
    for part in merged.blocks:
        whole = block(seed=part.seed, rank=part.rank, modules=list(merged.shapes))
        assert part.checksums == whole.checksums


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 4])
def test_a_wrong_number_of_weights_is_refused(merge: Merge, three: list[Adapter], weights: list[float]) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^merge\.weights: {len(weights)} given for 3 adapters \(task0, task1, task2\); give one weight per",
    ):
        merge(three, weights=weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(merge: Merge, three: list[Adapter], weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"^merge\.weights: got {weight} for task1; give a finite number"):
        merge(three, weights=[1.0, weight, 1.0])


def test_no_adapters_are_refused(merge: Merge) -> None:
    with pytest.raises(AdapterError, match=r"^merge: got no adapters; give at least one"):
        merge([], weights=[])


def test_another_shape_is_refused_with_its_module(merge: Merge, three: list[Adapter]) -> None:
    odd = Adapter(shapes={"layers.1.q_proj": (6, 9)}, blocks=(block("odd", modules=[]),), targets="all-linear")
    wanted = (
        r"^layers\.1\.q_proj: task1 was trained on a weight of shape \(6, 5\), odd on \(6, 9\); merge adapters of one"
    )
    with pytest.raises(AdapterError, match=wanted):
        merge([three[1], odd], weights=[1, 1])


def test_another_base_is_refused(merge: Merge) -> None:
    bases = [{"weights": "aa", "name": "x"}, {}, {"weights": "bb", "name": "y"}]
    one, two, three = (adapter(block(f"task{place}"), base=base) for place, base in enumerate(bases))
    wanted = (
        r"^merge: task0 was trained on a base model with weights aa, task2 on one with bb; merge adapters of one base"
    )
    with pytest.raises(AdapterError, match=wanted):
        merge([one, two, three], weights=[1, 1, 1])
    assert merge([two, three], weights=[1, 1]).base == bases[2]  # an unknown base takes the known one's name


def test_another_generator_is_refused(merge: Merge, three: list[Adapter]) -> None:
    odd = adapter(block("odd"), generator="mersenne")
    with pytest.raises(
        AdapterError, match=r"^merge: A of task0 comes from philox4x64-10, A of odd from mersenne; merge"
    ):
        merge([three[0], odd], weights=[1, 1])
