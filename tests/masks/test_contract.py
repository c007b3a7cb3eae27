"""What holds for every mask, found as the configuration finds it."""

import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist import plugin
from lori_dist.errors import AdapterError, ConfigError
from tests.masks.oracle import DENSITIES, MODULES, adapters

Mask = Callable[..., dict[str, Tensor]]
NAMES = plugin.names("masks")


def load(name: str) -> Mask:
    return plugin.find("masks", name, "mask", "adapter.mask").load()


@pytest.fixture(params=NAMES)
def mask(request: pytest.FixtureRequest) -> Mask:
    return load(request.param)


@pytest.fixture
def b() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {module: torch.randn(13, 4, generator=generator) for module in MODULES}


def test_the_signature_is_the_one_documented(mask: Mask) -> None:
    first, *others = inspect.signature(mask).parameters.values()
    assert first.name == "b"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    assert [parameter.name for parameter in others if parameter.default is inspect.Parameter.empty] == ["density"]
    assert mask.__doc__ is not None and mask.__doc__.startswith("Keeps ")


@pytest.mark.parametrize("name", NAMES)
def test_processes_can_choose_together_with_the_same_options(name: str) -> None:
    method = plugin.find("masks", name, "mask", "adapter.mask")
    rule = method.companion("rule")
    assert rule is not None
    assert {option: parameter.default for option, parameter in inspect.signature(rule).parameters.items()} == {
        option: about.default for option, about in method.options.items()
    }


@given(st.sampled_from(NAMES), adapters(), DENSITIES)
def test_masks_are_bool_of_the_shapes_and_order_of_b_and_keep_a_known_number(
    name: str, b: dict[str, Tensor], density: float
) -> None:
    masks = load(name)(b, density=density)
    assert list(masks) == list(b)
    assert all(masks[module].dtype == torch.bool and masks[module].shape == b[module].shape for module in b)
    if name in ("magnitude", "random"):
        assert sum(int(kept.sum()) for kept in masks.values()) == max(
            1, round(density * sum(tensor.numel() for tensor in b.values()))
        )


def test_the_same_b_gives_the_same_mask_whatever_the_global_generator(mask: Mask, b: dict[str, Tensor]) -> None:
    first = mask(b, density=0.3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = mask({module: tensor.clone() for module, tensor in b.items()}, density=0.3)
    assert all(torch.equal(first[module], second[module]) for module in b)
    assert torch.equal(torch.get_rng_state(), state)


def test_b_stays_as_it_is(mask: Mask, b: dict[str, Tensor]) -> None:
    before = {module: tensor.clone() for module, tensor in b.items()}
    mask(b, density=0.3)
    assert all(torch.equal(before[module], b[module]) for module in b)


def test_parameters_transposed_and_sliced_tensors_are_read(mask: Mask, b: dict[str, Tensor]) -> None:
    strided = {module: torch.nn.Parameter(tensor.t().contiguous()).t() for module, tensor in b.items()}
    plain, other = mask(b, density=0.3), mask(strided, density=0.3)
    assert all(torch.equal(plain[module], other[module]) for module in b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_b_does_not_matter(mask: Mask, b: dict[str, Tensor], dtype: torch.dtype) -> None:
    rounded = {module: tensor.bfloat16().to(torch.float16).to(dtype) for module, tensor in b.items()}
    plain = mask({module: tensor.float() for module, tensor in rounded.items()}, density=0.3)
    other = mask(rounded, density=0.3)
    assert all(torch.equal(plain[module], other[module]) for module in b)


def test_density_one_keeps_all(mask: Mask, b: dict[str, Tensor]) -> None:
    assert all(kept.all() for kept in mask(b, density=1.0).values())


def test_nothing_has_no_mask(mask: Mask) -> None:
    assert mask({}, density=0.5) == {}
    empty = mask({"a": torch.zeros(0, 4), "b": torch.ones(2, 2)}, density=1.0)
    assert (empty["a"].shape, int(empty["b"].sum())) == ((0, 4), 4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0000001, 7, float("nan"), float("inf")])
def test_a_density_outside_0_to_1_is_refused(mask: Mask, b: dict[str, Tensor], density: float) -> None:
    with pytest.raises(ConfigError, match=f"^density: got {density}; it is kept entries over all"):
        mask(b, density=density)


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused_by_module(mask: Mask, b: dict[str, Tensor], strange: float) -> None:
    b[MODULES[3]][2, 1] = strange
    b[MODULES[3]][4, 0] = -strange
    with pytest.raises(
        AdapterError, match=rf"^{MODULES[3]}: 2 of 52 entries of B are NaN or infinite; the calibration"
    ):
        mask(b, density=0.5)


def test_entries_whose_sum_overflows_are_finite(mask: Mask) -> None:
    largest = torch.finfo(torch.float32).max
    assert int(mask({"a": torch.full((2, 2), largest)}, density=0.5)["a"].sum()) == 2


@pytest.mark.gpu
def test_the_mask_is_the_same_on_a_gpu(mask: Mask, b: dict[str, Tensor]) -> None:
    there = mask({module: tensor.cuda() for module, tensor in b.items()}, density=0.3)
    here = mask(b, density=0.3)
    assert all(there[module].is_cuda and torch.equal(there[module].cpu(), here[module]) for module in b)


def test_masks_need_torch_and_numpy_alone() -> None:
    program = f"""
import importlib, sys
for name in {NAMES}:
    importlib.import_module("lori_dist.masks." + name)
print(sorted({{"transformers", "ray", "deepspeed", "accelerate", "pydantic", "yaml"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
