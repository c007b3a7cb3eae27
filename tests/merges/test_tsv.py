"""TSV: orthogonal directions, and no more of them than fit."""

import functools

import pytest
import torch

from lori_dist import merges
from lori_dist.errors import ConfigError
from tests.merges.made import SHAPES, adapter, block, delta

merge = functools.partial(merges.merge, method="tsv")


@pytest.mark.parametrize("method", ["tsv", "core_space"])
def test_on_one_a_there_is_room_for_r_by_t_of_each(method: str) -> None:
    """Above that, directions outside of row(A) would be invented."""
    inner = {"inner": "tsv"} if method == "core_space" else {}
    tasks = [adapter(block(f"t{place}", rank=3, draw=place)) for place in range(2)]
    merge = functools.partial(merges.merge, tasks, method=method, weights=[1, 1])
    (part,) = merge(options={**inner, "keep": 1}).blocks
    assert (part.seed, part.rank) == (0, 3)
    with pytest.raises(
        ConfigError,
        match=r"^merge\.method\.keep: got 2, and in layers\.0\.q_proj they share an A of rank 3, which has room "
        r"for 1 of each of 2 tasks; give at most 1",
    ):
        merge(options={**inner, "keep": 2})


def test_no_more_than_a_share_of_the_smaller_side_is_kept() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, rank=3, draw=seed)) for seed in range(2)]
    with pytest.raises(
        ConfigError, match=r"keep: got 2, and the weight of layers\.1\.up_proj is 3 x 8, which has room for 1 of"
    ):
        merge(tasks, weights=[1, 1], options={"keep": 2})


def test_more_tasks_than_the_rank_of_their_a_are_refused() -> None:
    tasks = [adapter(block(f"t{place}", draw=place)) for place in range(3)]
    with pytest.raises(
        ConfigError, match=r"share an A of rank 2, which has room for 0 of each of 3 tasks; merge fewer tasks, or with"
    ):
        merge(tasks, weights=[1, 1, 1])


def test_orthogonal_tasks_are_just_added() -> None:
    """The polar factor of orthonormal columns is themselves."""
    tasks = [adapter(block(f"t{place}", seed=place, rank=1, draw=place)) for place in range(2)]
    merged = merge(tasks, weights=[1.0, 1.0])
    for module in SHAPES:
        singulars = [torch.linalg.svd(delta(task, module), full_matrices=False) for task in tasks]
        cosines = [abs(singulars[0][0][:, 0] @ singulars[1][0][:, 0]), abs(singulars[0][2][0] @ singulars[1][2][0])]
        wanted = sum(delta(task, module) for task in tasks)
        error = (delta(merged, module) - wanted).norm() / wanted.norm()
        assert error < 2 * max(cosines)


def test_a_task_given_twice_stays_in_its_span() -> None:
    """Its directions are dependent, so that a polar factor alone would be free to invent some."""
    one = adapter(block("a", rank=2))
    merged = merge([one, adapter(block("b", rank=2))], weights=[1.0, 1.0])
    for module in SHAPES:
        top = torch.linalg.svd(delta(one, module), full_matrices=False)
        outside = delta(merged, module) - top[0][:, :1] @ top[0][:, :1].t() @ delta(merged, module)
        assert outside.abs().max() < 1e-10


def test_weights_scale_singular_values_of_any_sign() -> None:
    one = adapter(block("a", rank=2))
    merged = merge([one], weights=[-0.5])
    assert all(torch.allclose(delta(merged, module), -0.5 * delta(one, module), atol=1e-12) for module in SHAPES)


def test_a_result_with_an_a_each_has_rank_t_keep() -> None:
    tasks = [adapter(block(f"t{seed}", seed=seed, draw=seed)) for seed in range(2)]
    (part,) = merge(tasks, weights=[1, 1], options={"keep": 1}).blocks
    assert (part.seed, part.rank) == (None, 2)
