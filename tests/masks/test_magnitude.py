"""The model-wise mask against a brute-force sort, and its edges."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from lori_dist.masks import _select
from lori_dist.masks.magnitude import mask
from tests.masks.oracle import DENSITIES, adapters, flat, kept


@given(adapters(), DENSITIES)
def test_the_mask_is_the_start_of_a_stable_sort_of_the_whole_model(b: dict[str, Tensor], density: float) -> None:
    assert flat(mask(b, density=density)) == kept(b, lambda module: "", density)


@given(adapters(), DENSITIES)
def test_zeros_are_kept_only_when_all_others_are(b: dict[str, Tensor], density: float) -> None:
    masks = mask(b, density=density)
    zeros_kept = any((masks[module] & (b[module] == 0)).any() for module in b)
    others_left = any((~masks[module] & (b[module] != 0)).any() for module in b)
    assert not (zeros_kept and others_left)


def test_ties_go_to_the_earlier_module_and_then_to_the_earlier_entry() -> None:
    b = {"z": torch.tensor([[1.0, -2.0], [2.0, 2.0]]), "a": torch.tensor([[-2.0, 3.0], [2.0, 2.0]])}
    assert flat(mask(b, density=4 / 8)) == {"z": [False, True, True, True], "a": [False, True, False, False]}
    assert flat(mask(b, density=5 / 8)) == {"z": [False, True, True, True], "a": [True, True, False, False]}


def test_exactly_k_are_kept_of_a_matrix_of_zeros() -> None:
    b = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    masks = mask(b, density=0.25)
    assert flat(masks) == {"a": [True] * 8 + [False] * 8, "b": [False] * 16}


@pytest.mark.parametrize(
    ("num_entries", "density", "num_kept"),
    [(5, 0.1, 1), (15, 0.1, 2), (25, 0.1, 2), (35, 0.1, 4), (10, 0.25, 2), (3, 1e-9, 1), (3, 1.0, 3), (1000, 0.1, 100)],
)
def test_k_is_rounded_half_to_even_and_at_least_one(num_entries: int, density: float, num_kept: int) -> None:
    b = {"a": torch.arange(num_entries, dtype=torch.float32).view(num_entries, 1) + 1}
    assert int(mask(b, density=density)["a"].sum()) == num_kept


def test_neighbouring_floats_are_told_apart() -> None:
    one = torch.tensor(1.0)
    above, below = torch.nextafter(one, torch.tensor(2.0)), torch.nextafter(one, torch.tensor(0.0))
    b = {"a": torch.stack([below, one, -above, one]).view(4, 1)}
    assert flat(mask(b, density=0.25)) == {"a": [False, False, True, False]}
    assert flat(mask(b, density=0.5)) == {"a": [False, True, True, False]}


def test_subnormal_values_are_no_zeros() -> None:
    b = {"a": torch.tensor([[0.0, 1e-45], [0.0, -3e-45]])}
    assert flat(mask(b, density=0.25)) == {"a": [False, False, False, True]}
    assert flat(mask(b, density=0.5)) == {"a": [False, True, False, True]}


def test_float64_is_not_rounded_to_float32() -> None:
    b = {"a": torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), "b": torch.tensor([[1.0, 0.5]])}
    assert flat(mask(b, density=0.25)) == {"a": [False, True], "b": [False, False]}


def test_a_large_matrix_in_many_pieces_equals_the_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "_PIECE", 1000)
    generator = torch.Generator().manual_seed(3)
    b = {name: torch.randn(700, 16, generator=generator).mul_(100).round_().div_(100) for name in ("a", "b", "c")}
    together = torch.cat([tensor.flatten().abs() for tensor in b.values()])
    order = torch.sort(together, descending=True, stable=True).indices[: round(0.1 * together.numel())]
    wanted = torch.zeros(together.numel(), dtype=torch.bool).index_fill_(0, order, True)
    assert torch.equal(torch.cat([kept.flatten() for kept in mask(b, density=0.1).values()]), wanted)
