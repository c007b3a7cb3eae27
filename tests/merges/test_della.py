"""DELLA: larger entries are kept more probably, and the expectation is what it was."""

import pytest
import torch

from lori_dist import merges
from lori_dist.adapter.adapter import Entries
from lori_dist.errors import ConfigError
from lori_dist.merges._entries import Draw, by_rank, thin
from tests.merges.made import SHAPES, adapter, block

X = torch.tensor([[0.1, -3.0, 0.0, 2.0], [0.0, 0.0, 5.0, 0.0]], dtype=torch.float64)


def test_the_probability_follows_the_rank_in_the_row() -> None:
    wanted = torch.tensor([[0.4, 0.8, 0.6, 0.6], [0.6, 0.6, 0.6, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(by_rank(X, 0.6, 0.2), wanted, rtol=0, atol=1e-15)


def test_the_mean_over_seeds_is_the_matrix() -> None:
    found = torch.stack([thin(X, by_rank(X, 0.6, 0.2), Draw(seed=seed, module="m"), "a") for seed in range(4000)])
    kept = (found != 0).double().mean(dim=0)
    torch.testing.assert_close(kept, torch.where(X == 0, 0.0, by_rank(X, 0.6, 0.2)), rtol=0, atol=0.03)
    torch.testing.assert_close(found.mean(dim=0), X, rtol=0.05, atol=0)


def test_one_task_loses_entries_and_the_others_are_divided_by_their_probability() -> None:
    ones = {module: torch.ones(rows * 2).double() for module, (rows, _) in SHAPES.items()}
    entries = {module: Entries(index=None, values=values) for module, values in ones.items()}
    one = adapter(block("a", rank=2, entries=entries))
    merged = merges.merge([one], method="della", options={"density": 0.5, "epsilon": 0.25}, weights=[1.0])
    [part] = merged.blocks
    found = torch.cat([kept.values for kept in part.entries.values()])
    assert set(found.tolist()) == {1 / 0.25, 1 / 0.75}
    assert found.numel() < sum(rows * 2 for rows, _ in SHAPES.values())


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.9, 0.3), (0.2, 0.2), (0.5, 0.6)])
def test_probabilities_outside_of_0_and_1_are_refused(density: float, epsilon: float) -> None:
    wanted = rf"^merge\.method\.epsilon: got {epsilon} with density {density}, so entries .*give an epsilon below"
    with pytest.raises(ConfigError, match=wanted):
        merges.merge([adapter(block("a"))], method="della", options={"density": density, "epsilon": epsilon})
