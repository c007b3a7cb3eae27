"""Weights that differ between layers and modules."""

import math
from pathlib import Path

import pytest
import torch

from lori_dist import merges, plugin
from lori_dist.__main__ import main
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import ConfigError
from lori_dist.formats import native
from lori_dist.merges import Weight, _weights, drop, merge, reweight
from tests.merges.made import SHAPES, adapter, block, delta


def task(place: int, **fields: object) -> Adapter:
    return adapter(block(f"task{place}", seed=place, rank=3, draw=place, **fields))  # type: ignore[arg-type]


@pytest.fixture
def three() -> list[Adapter]:
    return [task(place) for place in range(3)]


PATTERNS: list[tuple[dict[str, float], list[float]]] = [
    ({"default": 0.5}, [0.5] * 4),
    ({}, [1 / 3] * 4),
    ({"q_proj": 2.0}, [2.0, 1 / 3, 2.0, 1 / 3]),
    ({"layers.0": 2.0, "default": 1.0}, [2.0, 2.0, 1.0, 1.0]),
    ({"default": 1.0, "layers.1.*": 0.0}, [1.0, 1.0, 0.0, 0.0]),
    ({"*.up_proj": 2.0, "layers.0.*": 3.0}, [3.0, 3.0, 1 / 3, 2.0]),
    ({"layers.0.*": 3.0, "*.up_proj": 2.0}, [3.0, 2.0, 1 / 3, 2.0]),  # the last that fits counts
    ({"layers.0.up_proj": -1.0}, [1 / 3, -1.0, 1 / 3, 1 / 3]),
    ({"layers.[1-9].*": -1.0}, [1 / 3, 1 / 3, -1.0, -1.0]),
]


@pytest.mark.parametrize(("weight", "wanted"), PATTERNS)
def test_the_last_pattern_that_fits_counts(weight: dict[str, float], wanted: list[float]) -> None:
    assert [_weights.of(weight, module, 1 / 3) for module in SHAPES] == wanted


@pytest.mark.parametrize("pattern", ["proj", "layers", "ayers.0", "layers.0.q", "0.q_proj.x", "Layers.0", "*.q"])
def test_parts_of_a_path_are_whole(pattern: str) -> None:
    fitting = [module for module in SHAPES if _weights.fits(pattern, module)]
    assert fitting == (list(SHAPES) if pattern == "layers" else [])


def test_layers_of_two_digits_are_others() -> None:
    assert not _weights.fits("layers.1", "layers.10.q_proj")
    assert not _weights.fits("layers.1.*", "layers.10.q_proj")


@pytest.mark.parametrize("name", plugin.names("merges"))
@pytest.mark.parametrize("shared", [False, True])
def test_every_module_is_merged_with_its_own_weights(name: str, shared: bool) -> None:
    adapters = [adapter(block(f"t{place}", seed=0 if shared else place, rank=3, draw=place)) for place in range(3)]
    given: list[Weight] = [{"default": 0.7, "q_proj": -0.2}, 0.5, {"layers.1": 1.5, "layers.0": 0.3}]
    merged = merge(adapters, method=name, weights=given)
    for module in SHAPES:
        weights = [_weights.of(weight, module, 1 / 3) for weight in given]
        alone = merge(adapters, method=name, weights=weights)
        torch.testing.assert_close(delta(merged, module), delta(alone, module), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", plugin.names("merges"))
def test_one_weight_for_all_modules_is_a_number(name: str, three: list[Adapter], tmp_path: Path) -> None:
    native.save(merge(three, method=name, weights=[0.5, -0.2, 1.0]), tmp_path / "numbers")
    given: list[Weight] = [{"default": 0.5}, {"default": 3.0, "*": -0.2}, {"layers": 1.0}]
    native.save(merge(three, method=name, weights=given), tmp_path / "patterns")
    assert (tmp_path / "patterns").read_bytes() == (tmp_path / "numbers").read_bytes()


def test_a_task_stays_one_block_of_a_concat(three: list[Adapter], tmp_path: Path) -> None:
    given: list[Weight] = [{"default": 0.0, "layers.0": 0.5, "layers.1.q_proj": 2.0}, 1.0, {"default": 0.0}]
    merged = merge(three, method="concat", weights=given)
    assert [(part.name, part.seed, part.weight) for part in merged.blocks] == [
        ("task0", 0, 0.5),
        ("task1", 1, 1.0),
        ("task2", 2, 0.0),
    ]
    assert "layers.1.up_proj" not in merged.blocks[0].entries
    for module in SHAPES:
        weight = {"layers.1.q_proj": 2.0, "layers.1.up_proj": 0.0}.get(module, 0.5)
        wanted = weight * delta(three[0], module) + delta(three[1], module)
        torch.testing.assert_close(delta(merged, module), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(delta(drop(merged, "task0"), module), delta(three[1], module), rtol=0, atol=1e-12)
        halved = weight / 2 * delta(three[0], module) + delta(three[1], module)
        torch.testing.assert_close(delta(reweight(merged, {"task0": 0.25}), module), halved, rtol=0, atol=1e-12)
    native.save(merged, tmp_path / "merged")
    assert [part.name for part in native.load(tmp_path / "merged").blocks] == ["task0", "task1", "task2"]


def test_blocks_without_a_seed_have_weights_too(three: list[Adapter]) -> None:
    computed = merge(three, method="svd")
    assert computed.blocks[0].seed is None
    merged = merge([computed, three[0]], method="concat", weights=[{"default": 0.5, "q_proj": -1.0}, 1.0])
    assert len(merged.blocks) == 2
    for module in SHAPES:
        weight = -1.0 if "q_proj" in module else 0.5
        wanted = weight * delta(computed, module) + delta(three[0], module)
        torch.testing.assert_close(delta(merged, module), wanted, rtol=0, atol=1e-7)


def test_patterns_that_fit_nothing_are_named_with_what_there_is(three: list[Adapter]) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(three, method="linear", weights=[{"k_proj": 1.0, "q_porj": 2.0}, 1.0, {"layers.7.*": 1.0, "*": 1.0}])
    assert str(caught.value).split("\n") == [
        "merge.weights: of task0, 'k_proj' matches none of its 4 modules, which are called q_proj, up_proj, such as "
        "layers.0.q_proj. Did you mean 'q_proj'?",
        "merge.weights: of task0, 'q_porj' matches none of its 4 modules, which are called q_proj, up_proj, such as "
        "layers.0.q_proj. Did you mean 'q_proj'?",
        "merge.weights: of task2, 'layers.7.*' matches none of its 4 modules, which are called q_proj, up_proj, "
        "such as "
        "layers.0.q_proj. Did you mean 'layers.1.q_proj'?",
    ]


def test_patterns_are_for_the_modules_of_their_own_adapter(three: list[Adapter]) -> None:
    few = adapter(block("few", seed=9, modules=["layers.0.q_proj"]), modules=["layers.0.q_proj"])
    merge([few, three[0]], method="linear", weights=[1.0, {"up_proj": 1.0}])
    with pytest.raises(ConfigError, match="of few, 'up_proj' matches none of its 1 modules"):
        merge([few, three[0]], method="linear", weights=[{"up_proj": 1.0}, 1.0])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(three: list[Adapter], number: float) -> None:
    with pytest.raises(ConfigError, match=f"got {number} for task1; give a finite number"):
        merge(three, method="linear", weights=[1.0, {"q_proj": number}, 1.0])


def test_the_command_takes_patterns(
    three: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, part in enumerate(three[:2]):
        native.save(part, tmp_path / str(place))
    words = ["merge", "out", "0", "1", "--method", "linear", "--weights"]
    assert main([*words, '-0.5,{default: 0.4, "*.up_proj": 6e-1, layers.1.q_proj: 1}']) == 0
    wanted = merges.merge(three[:2], method="linear", weights=[-0.5, {"default": 0.4, "up_proj": 0.6, SHAPE: 1.0}])
    found = native.load(tmp_path / "out")
    assert all(torch.allclose(delta(found, module), delta(wanted, module), rtol=0, atol=1e-5) for module in SHAPES)
    for text in ("{q_proj: x},1", "{q_proj: [1]},1", "[1],1", "{,1", "null,1"):
        capsys.readouterr()
        assert main([*words[:1], "no", *words[2:], text]) == 2
        assert capsys.readouterr().err.startswith(f"--weights: got {text!r}")


SHAPE = "layers.1.q_proj"
