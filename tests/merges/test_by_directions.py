"""CP, Compress-then-Merge, Iso and DO-Merging where the right answer is known."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lori_dist import merges
from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.errors import ConfigError
from lori_dist.merges.cp import _apart, _fitted, _together
from tests.merges.made import adapter, block, delta

MODULE = "layers.0.up_proj"


def rank_of(what: Adapter) -> int:
    return int(torch.linalg.matrix_rank(delta(what, MODULE), rtol=1e-9))


def tasks(number: int, *, rank: int = 1, shared: bool = False) -> list[Adapter]:
    return [
        adapter(
            block(f"t{place}", seed=0 if shared else place, rank=rank, draw=place, density=1.0, modules=[MODULE]),
            modules=[MODULE],
        )
        for place in range(number)
    ]


def difference(one: Adapter, other: Adapter) -> float:
    return float((delta(one, MODULE) - delta(other, MODULE)).abs().max())


# CP.


def test_cp_at_the_sum_of_the_ranks_is_the_weighted_sum() -> None:
    three, weights = tasks(3), [0.5, -0.2, 1.0]
    merged = merges.merge(three, method="cp", options={"rank": 3}, weights=weights)
    assert difference(merged, merges.merge(three, method="linear", weights=weights)) < 1e-12


@pytest.mark.parametrize("shared", [True, False])
def test_cp_and_compress_have_the_rank_of_one_task(shared: bool) -> None:
    for method in ("cp", "compress"):
        merged = merges.merge(tasks(3, rank=2, shared=shared), method=method)
        assert rank_of(merged) == 2
        assert sum(part.rank for part in merged.blocks) == 2


def test_cp_finds_terms_that_tasks_share() -> None:
    generator = torch.Generator().manual_seed(3)
    u, v, c = (torch.randn(rows, 2, generator=generator, dtype=torch.float64) for rows in (7, 5, 4))
    x = torch.einsum("pk,qk,tk->tpq", u, v, c)
    error = min(_fitted(x, start, 2000, 0.0)[0] for start in (_together(x, 2), _apart(x, 2)))
    assert error < 1e-6


def test_the_error_of_cp_never_grows() -> None:
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for start in (_together(x, 2), _apart(x, 2)):
        errors = [_fitted(x, start, sweeps, 0.0)[0] for sweeps in range(1, 12)]
        assert all(later <= earlier + 1e-14 for earlier, later in itertools.pairwise(errors))


# Compress-then-Merge.


def test_compress_at_the_rank_of_all_is_the_weighted_sum() -> None:
    three, weights = tasks(3), [0.5, -0.2, 1.0]
    merged = merges.merge(three, method="compress", options={"rank": 3}, weights=weights)
    assert difference(merged, merges.merge(three, method="linear", weights=weights)) < 1e-12


def test_sweeps_hold_more_of_the_tasks() -> None:
    three = tasks(3, rank=2)

    def held(sweeps: int) -> float:
        """As each task's part is seen, which is linear in the weights."""
        found = 0.0
        for place in range(3):
            weights = [float(place == other) for other in range(3)]
            merged = merges.merge(three, method="compress", options={"sweeps": sweeps}, weights=weights)
            found += float(delta(merged, MODULE).square().sum())
        return found

    assert held(0) < held(1) <= held(10) + 1e-12


@pytest.mark.parametrize("method", ["cp", "compress"])
def test_a_rank_above_the_shape_is_refused(method: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^merge\.method\.rank: got 6, and the weight of layers\.0\.up_proj is 7 x 5"
    ):
        merges.merge(tasks(2), method=method, options={"rank": 6})


# Iso.


def singular_values(what: Adapter) -> Tensor:
    values = torch.linalg.svdvals(delta(what, MODULE))
    return values[values > 1e-9]


@pytest.mark.parametrize("common", [1.0, 0.8, 0.4])
def test_iso_makes_all_singular_values_equal(common: float) -> None:
    merged = merges.merge(tasks(2, rank=2), method="iso", options={"common": common})
    values = singular_values(merged)
    assert values.numel() == 4
    torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-9, atol=0)


def test_iso_c_is_the_sum_with_the_mean_of_its_singular_values() -> None:
    three = tasks(3)
    u, s, vh = torch.linalg.svd(sum(delta(task, MODULE) for task in three), full_matrices=False)  # type: ignore[arg-type]
    merged = merges.merge(three, method="iso", options={"common": 1.0})
    torch.testing.assert_close(delta(merged, MODULE), s[:3].mean() * u[:, :3] @ vh[:3], rtol=0, atol=1e-10)


def test_iso_invents_no_directions_where_tasks_are_equal() -> None:
    """What common directions leave of the tasks is rounding, which must not be made as large as they are."""
    equal = tasks(1, rank=4) * 2
    merged = merges.merge(equal, method="iso", options={"common": 0.99})
    whole = delta(equal[0], MODULE)
    outside = torch.eye(7).double() - whole @ torch.linalg.pinv(whole)
    assert float((outside @ delta(merged, MODULE)).abs().max()) < 1e-9


# DO-Merging.


def of_rows(rows: Mapping[int, float], name: str) -> Adapter:
    """B of rank 1 with these values, on one A: rows of D are multiples of A."""
    b = torch.zeros(7, dtype=torch.float64)
    for row, value in rows.items():
        b[row] = value
    kept = b.nonzero().squeeze(1)
    entries = {MODULE: Entries(index=kept.to(torch.int32), values=b[kept])}
    return adapter(block(name, rank=1, alpha=1.0, entries=entries, modules=[MODULE]), modules=[MODULE])


def test_sizes_are_averaged_and_directions_summed() -> None:
    """A row of two tasks of sizes 1 and 9 has the mean size 5, with each direction at its weight."""
    one, other = of_rows({0: 1.0, 1: 1.0, 2: 4.0}, "a"), of_rows({0: 9.0, 1: -9.0}, "b")
    merged = merges.merge([one, other], method="do_merging", options={"steps": 0}, weights=[0.5, 0.5])
    wanted = of_rows({0: 5.0, 2: 2.0}, "wanted")
    assert difference(merged, wanted) < 1e-12


def test_the_descent_makes_tasks_more_orthogonal_and_gamma_holds_them() -> None:
    two = tasks(2, rank=2)

    still = merges.merge(two, method="do_merging", options={"steps": 0})

    def moved(steps: int, gamma: float) -> float:
        options = {"steps": steps, "gamma": gamma}
        return difference(merges.merge(two, method="do_merging", options=options), still)

    assert moved(50, 100.0) < moved(50, 1.0) < moved(50, 0.0)
