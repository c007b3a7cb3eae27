"""The mask of each B alone."""

import torch
from hypothesis import given
from torch import Tensor

from lori_dist.masks.per_matrix import mask
from tests.masks.oracle import DENSITIES, adapters, flat, kept


@given(adapters(), DENSITIES)
def test_every_module_keeps_the_start_of_its_own_sort(b: dict[str, Tensor], density: float) -> None:
    masks = mask(b, density=density)
    assert flat(masks) == kept(b, lambda module: module, density)
    assert all(int(masks[module].sum()) == max(1, round(density * b[module].numel())) for module in b)


def test_the_order_of_modules_does_not_matter() -> None:
    b = {"a": torch.ones(3, 3), "b": torch.ones(2, 3)}
    assert flat(mask(b, density=0.4)) == flat(mask(dict(reversed(b.items())), density=0.4))
