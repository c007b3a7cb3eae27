"""The random mask: a function of seed and paths, uniform over the subsets of its size."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from lori_dist.masks import _select, random
from tests.masks.oracle import flat


@pytest.fixture
def b() -> dict[str, Tensor]:
    return {"layers.0.q": torch.ones(40, 8), "layers.0.v": -torch.ones(25, 8), "layers.1.q": torch.ones(40, 8)}


def test_values_and_the_order_of_modules_do_not_matter(b: dict[str, Tensor]) -> None:
    first = flat(random.mask(b, density=0.3, seed=5))
    other = {module: torch.randn_like(tensor) for module, tensor in reversed(b.items())}
    assert flat(random.mask(other, density=0.3, seed=5)) == first


def test_zeros_are_kept_only_once_all_others_are(b: dict[str, Tensor]) -> None:
    b["layers.0.v"].zero_()
    assert not random.mask(b, density=640 / 840)["layers.0.v"].any()
    masks = random.mask(b, density=700 / 840)
    assert [int(kept.sum()) for kept in masks.values()] == [320, 60, 320]


def test_seeds_and_paths_give_different_masks(b: dict[str, Tensor]) -> None:
    first, second = random.mask(b, density=0.3), random.mask(b, density=0.3, seed=1)
    assert flat(first) != flat(second)
    assert not torch.equal(first["layers.0.q"], first["layers.1.q"])
    shared = sum(int((first[module] & second[module]).sum()) for module in b)
    assert 45 <= shared <= 110  # 0.3 * 0.3 of 840 entries are 75.6, with a deviation of 6.1


def test_the_mask_of_a_seed_is_frozen() -> None:
    masks = random.mask({"layers.0.q": torch.ones(4, 4), "layers.1.q": torch.ones(3, 4)}, density=0.25, seed=3)
    assert {module: kept.flatten().nonzero().flatten().tolist() for module, kept in masks.items()} == {
        "layers.0.q": [8, 9, 10, 11],
        "layers.1.q": [4, 6, 8],
    }


def test_pieces_do_not_change_the_mask(b: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    first = flat(random.mask(b, density=0.3))
    monkeypatch.setattr(_select, "_PIECE", 11)
    assert flat(random.mask(b, density=0.3)) == first


def test_every_subset_is_equally_likely() -> None:
    b = {"a": torch.ones(2, 2), "b": torch.ones(1, 2)}
    num_draws = 2000
    counts = Counter(
        tuple(torch.cat([kept.flatten() for kept in random.mask(b, density=0.5, seed=seed).values()]).tolist())
        for seed in range(num_draws)
    )
    subsets = [subset for subset in itertools.product([False, True], repeat=6) if sum(subset) == 3]
    assert set(counts) == set(subsets)
    expected = num_draws / len(subsets)
    chi_squared = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    assert chi_squared < 43.8  # 19 degrees of freedom, exceeded once in 1000 times
