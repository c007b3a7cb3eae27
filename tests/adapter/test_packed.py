"""Several adapters on one model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lori_dist import (
    Adapter,
    AdapterError,
    Spec,
    attach,
    attach_several,
    dense,
    detach,
    extract,
    sparsify,
    trainable,
)
from lori_dist.adapter import packed
from lori_dist.adapter.adapter import Block
from lori_dist.adapter.routing import adapter_of, name_of
from lori_dist.merges import merge
from lori_dist.training.engine import trained
from tests.models import tiny_gpt2, tiny_llama

IDS = torch.tensor(
    [[1, 5, 9, 30, 7], [1, 40, 41, 42, 2], [3, 3, 8, 1, 0], [2, 9, 9, 4, 4], [7, 1, 2, 3, 5], [1, 1, 6, 6, 2]]
)
models = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


def made(make: Callable[[], nn.Module], seed: int, rank: int, targets: str | tuple[str, ...] = "all-linear") -> Adapter:
    model = make()
    attach(model, Spec(rank=rank, alpha=float(3 + seed), seed=seed, targets=targets))
    generator = torch.Generator().manual_seed(seed)
    for values in trainable(model).values():
        values.data.normal_(generator=generator)
    return extract(model, name=f"task{seed}")


def several(make: Callable[[], nn.Module]) -> dict[str, Adapter]:
    """Of unequal ranks and targets, and a merge with an A for each task."""
    first, second = made(make, 1, 4), made(make, 2, 3)
    some = next(path for path in first.shapes)
    return {
        "first": first,
        "second": second,
        "some": made(make, 3, 2, (some,)),
        "both": merge([first, second], method="concat", options={}, weights=[0.5, -2.0]),
    }


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def alone(make: Callable[[], nn.Module], adapter: Adapter | None, ids: Tensor) -> Tensor:
    model = make()
    if adapter is not None:
        attach(model, adapter)
    return logits(model, ids)


@models
@pytest.mark.parametrize(
    "rows",
    [
        ["first", "first", "second", "second", "both", "both"],
        ["some", "first", None, "both", "second", "first"],
        ["second"] * 6,
        [None] * 6,
    ],
)
def test_each_row_meets_its_own(make: Callable[[], nn.Module], rows: list[str | None]) -> None:
    adapters, model = several(make), make()
    routing = attach_several(model, adapters)
    with routing.rows(rows):
        found = logits(model)
    for row, name in enumerate(rows):
        wanted = alone(make, None if name is None else adapters[name], IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["first", "second", None]), min_size=1, max_size=6))
def test_whatever_the_order(rows: list[str | None]) -> None:
    adapters = {name: adapter for name, adapter in several(tiny_llama).items() if name in ("first", "second")}
    model = tiny_llama()
    with attach_several(model, adapters).rows(rows):
        found = logits(model, IDS[: len(rows)])
    for name in set(rows):
        places = [row for row, one in enumerate(rows) if one == name]
        wanted = alone(tiny_llama, None if name is None else adapters[name], IDS[places])
        torch.testing.assert_close(found[places], wanted, rtol=1e-4, atol=1e-4)


def test_without_being_told_all_rows_meet_one() -> None:
    adapters, model = several(tiny_llama), tiny_llama()
    routing = attach_several(model, adapters)
    for name in (None, "both", "first"):
        routing.only(name)
        wanted = alone(tiny_llama, None if name is None else adapters[name], IDS)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_they_generate_side_by_side() -> None:
    adapters, model = several(tiny_llama), tiny_llama()
    routing = attach_several(model, adapters)
    ask: dict[str, int | bool] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with routing.rows(["first", "both"]):
        found = model.generate(IDS[:2], attention_mask=torch.ones_like(IDS[:2]), **ask)
    for row, name in enumerate(("first", "both")):
        one = tiny_llama()
        attach(one, adapters[name])
        ids = IDS[row : row + 1]
        assert torch.equal(found[row : row + 1], one.generate(ids, attention_mask=torch.ones_like(ids), **ask))


def test_a_row_too_few_or_an_unknown_name_is_refused() -> None:
    model = tiny_llama()
    routing = attach_several(model, several(tiny_llama))
    unknown = pytest.raises(AdapterError, match=r"rows: unknown adapter 'frist'; .*Did you mean 'first'\?")
    with unknown, routing.rows(["frist"]):
        pass
    with routing.rows(["first", "second", "both", "some"]), pytest.raises(AdapterError, match="for 4 rows"):
        logits(model)


def test_the_model_is_given_back() -> None:
    model = tiny_llama()
    before = logits(model)
    attach_several(model, several(tiny_llama))
    with pytest.raises(AdapterError, match="an adapter is attached already"):
        attach(model, Spec(rank=2, alpha=2.0, seed=1))
    detach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("ranks", "times"), [((2, 3), 1), ((8, 9), 20)])
def test_weights_and_values_of_merges_change_in_place(ranks: tuple[int, int], times: int) -> None:
    """Also where many tokens make it less work to add what merges share to the weight."""
    parts = [made(tiny_llama, 1, ranks[0]), made(tiny_llama, 2, ranks[1])]
    weights = {"old": [0.5, 0.5], "other": [1.0, 0.2], "new": [-0.3, 0.9]}
    merges = {name: merge(parts, method="concat", weights=pair) for name, pair in weights.items()}
    model = tiny_llama()
    routing = attach_several(model, {"x": merges["old"], "y": merges["other"]})
    layers = packed.routed(model)
    first = next(iter(layers.values()))
    assert len(first.deltas) == 2  # of two tasks in two merges
    assert packed.update(model, {"x": merges["new"]})
    assert packed.routed(model) == layers
    ids = IDS.repeat(times, 1)
    with routing.rows(["x"] * len(ids) + ["y"] * len(ids)):
        found = logits(model, torch.cat([ids, ids]))
        wide = torch.zeros(2 * len(ids), ids.shape[1], first.deltas[0].in_features)
        with torch.no_grad():
            assert (first._multiplied(wide) is not None) == (times > 1)
    wanted = torch.cat([alone(tiny_llama, merges[name], ids) for name in ("new", "other")])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for different in ({"x": parts[0]}, {"z": merges["new"]}, {"x": merge(parts, method="ties", weights=[1.0, 0.2])}):
        assert not packed.update(model, different)


def test_a_damaged_a_is_refused() -> None:
    adapter = made(tiny_llama, 1, 2)
    broken = {path: "0" * 16 for path in adapter.shapes}
    block: Block = dataclasses.replace(adapter.blocks[0], checksums=broken)
    with pytest.raises(AdapterError, match="has checksum"):
        attach_several(tiny_llama(), {"one": dataclasses.replace(adapter, blocks=(block,))})


# --- trained together ------------------------------------------------------------------------------------------------

SPECS = {name: Spec(rank=4, alpha=8.0, seed=seed) for seed, name in enumerate(("a", "b", "c"))}


def masks(density: Mapping[str, float]) -> dict[str, dict[str, Tensor]]:
    shapes = {path: (layer.deltas[0].out_features, 4) for path, layer in attach(tiny_llama(), SPECS["a"]).items()}
    generator = torch.Generator().manual_seed(6)
    return {
        name: {path: torch.rand(shape, generator=generator) < density[name] for path, shape in shapes.items()}
        for name in SPECS
    }


@pytest.mark.parametrize("density", [{"a": 0.2, "b": 0.0, "c": 0.5}, {"a": 1.0, "b": 0.3, "c": 1.0}, None])
@pytest.mark.parametrize("present", [("a", "b", "c"), ("c",), ("b", "c")])
def test_gradients_are_those_of_each_alone(density: dict[str, float] | None, present: tuple[str, ...]) -> None:
    """Entries that there are none of, all and some; of all adapters or of some."""
    model = tiny_llama()
    chosen = None if density is None else masks(density)
    routing = packed.attach(model, SPECS, chosen or {})
    generator = torch.Generator().manual_seed(1)
    values = dict(packed.trainable(model))
    for tensor in values.values():
        tensor.data.normal_(generator=generator)
    rows = {name: IDS[[place, place + 1]] for place, name in enumerate(SPECS) if name in present}
    ids = torch.cat(list(rows.values()))
    routing.begin([list(SPECS).index(name) for name in rows for _ in range(2)], ids.shape[1])
    model(ids, labels=ids).loss.mul(len(rows)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, of_task in rows.items():
        one = tiny_llama()
        attach(one, SPECS[name], masks=None if chosen is None else chosen[name])
        for path, tensor in trainable(one).items():
            tensor.data.copy_(values[name_of(path, name)])
        if trainable(one):
            one(of_task, labels=of_task).loss.backward()
        for path, tensor in trainable(one).items():
            assert tensor.grad is not None
            torch.testing.assert_close(routing.sums[name_of(path, name)][0], tensor.grad, rtol=1e-4, atol=1e-6)
    absent = {name for name in SPECS if name not in present}
    assert not any(adapter_of(name) in absent for name in routing.sums)


@pytest.mark.parametrize("projection", ["recomputed", "trained"])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_adapters_of_unlike_shapes(projection: Any, sizes: tuple[int, int]) -> None:
    """Ranks, scales, dtypes of A and how A is kept may differ, and a task may have more rows than another."""
    specs = {
        "a": Spec(rank=4, alpha=8.0, seed=1, projection=projection),
        "b": Spec(rank=2, alpha=3.0, seed=2, dtype=torch.bfloat16, targets=("q_proj", "down_proj")),
    }
    model = tiny_llama()
    routing = packed.attach(model, specs)
    generator = torch.Generator().manual_seed(1)
    values = dict(packed.trainable(model))
    for name, tensor in values.items():
        if not name.startswith("model.layers.0.self_attn.k_proj"):
            tensor.data.normal_(generator=generator)
    rows = {"a": IDS[: sizes[0]], "b": IDS[2 : 2 + sizes[1]]}
    ids = torch.cat(list(rows.values()))
    routing.begin([0] * sizes[0] + [1] * sizes[1], ids.shape[1])
    logits = model(ids).logits
    sum(part.square().mean() for part in logits.split(sizes)).backward()
    for name, of_task in rows.items():
        one = tiny_llama()
        attach(one, specs[name])
        for path, tensor in trained(one).items():
            tensor.data.copy_(values[name_of(path, name)])
        one(of_task).logits.square().mean().backward()
        for path, tensor in trained(one).items():
            assert tensor.grad is not None
            found = routing.sums[name_of(path, name)][0]
            torch.testing.assert_close(found, tensor.grad, rtol=2e-3, atol=1e-5)
        mine = extract(model, name=name)
        assert mine.shapes == extract(one, name=name).shapes
        assert mine.blocks[0].checksums == extract(one, name=name).blocks[0].checksums


def test_it_survives_casts_and_a_trip_to_meta() -> None:
    model = tiny_llama()
    packed.attach(model, SPECS, masks({"a": 0.2, "b": 0.1, "c": 0.5}))
    deltas = [delta for layer in packed.routed(model).values() for delta in layer.deltas]
    before = [(delta.a().clone(), delta.index) for delta in deltas]
    model.to(torch.bfloat16)
    for delta, (a, index) in zip(deltas, before, strict=True):
        delta.to("meta").to_empty(device="cpu")
        assert torch.equal(delta.a(), a)
        assert delta.index is index or (
            delta.index is not None and index is not None and torch.equal(delta.index, index)
        )
        assert delta.values is None or delta.values.dtype == torch.float32


def test_several_specs_are_trained_by_name_and_mistakes_are_named() -> None:
    model = tiny_llama()
    specs = {"math": Spec(rank=2, alpha=4.0, seed=1), "code": Spec(rank=2, alpha=4.0, seed=2)}
    routing = attach_several(model, specs)
    everything, of_math = trainable(model), trainable(model, "math")
    assert set(of_math) == {name for name in everything if name.endswith("@math")}
    assert len(everything) == 2 * len(of_math) > 0
    ids = torch.arange(3, 15).view(2, 6)
    with routing.rows(["math", "math"]):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in everything.items():
        assert parameter.grad is not None and bool(parameter.grad.any()) == name.endswith("@math"), name
    made = extract(model, name="code")
    assert made.blocks[0].name == "code" and made.blocks[0].seed == 2
    with pytest.raises(AdapterError, match=r"^adapter: unknown adapter 'maths'; there are math, code\. Did you mean"):
        trainable(model, "maths")
    with pytest.raises(AdapterError, match=r"^adapter: unknown adapter 'maths'"):
        extract(model, name="maths")
    with pytest.raises(AdapterError, match=r"^adapter: the model has math, code; name one of them"):
        dense(model)
    with pytest.raises(AdapterError, match=r"^masks: got masks for math; the model has adapters math, code"):
        sparsify(model, {"math": {}})
    with pytest.raises(AdapterError, match=r"^math: masks: no mask for model\.layers\.0"):
        sparsify(model, {"math": {}, "code": {}})
    detach(model)
    with pytest.raises(AdapterError, match=r"^math: is a Spec, and code a trained Adapter"):
        attach_several(model, {"math": specs["math"], "code": made})
    with pytest.raises(AdapterError, match=r"^math: got a str; wanted an Adapter or a Spec"):
        attach_several(model, {"math": "math.safetensors"})  # type: ignore[dict-item]
    attach_several(model, {"math": specs["math"], "code": Spec(rank=3, alpha=4.0, seed=2)})  # may differ in all
    detach(model)
    attach(model, specs["math"])
    with pytest.raises(AdapterError, match=r"^adapter: unknown adapter 'math'; the model has one, unnamed"):
        trainable(model, "math")
