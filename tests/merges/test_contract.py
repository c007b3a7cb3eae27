"""What holds for every merge, found as the configuration finds it."""

import functools
import inspect
import math
from collections.abc import Callable

import pytest
import torch

from lori_dist import merges, plugin
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError, ConfigError
from tests.merges.made import SHAPES, adapter, block, delta

Merge = Callable[..., Adapter]


@pytest.fixture(params=plugin.names("merges"))
def method(request: pytest.FixtureRequest) -> plugin.Method:
    return plugin.find("merges", request.param, "merge", "merge.method")


@pytest.fixture
def merge(method: plugin.Method) -> Merge:
    neutral = {"density": 1.0} if "density" in method.options else {}
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


def test_the_order_of_tasks_does_not_matter(merge: Merge, three: list[Adapter]) -> None:
    merged = merge(three, weights=[0.5, -0.2, 1.0])
    turned = merge([three[2], three[0], three[1]], weights=[1.0, 0.5, -0.2])
    assert same(merged, turned)
    assert merged.shapes == turned.shapes


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
    with pytest.raises(ConfigError, match=rf"^merge\.weights: {weight} was given for task1; give a finite number"):
        merge(three, weights=[1.0, weight, 1.0])


def test_no_adapters_are_refused(merge: Merge) -> None:
    with pytest.raises(AdapterError, match=r"^merge: no adapters were given; give at least one"):
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
