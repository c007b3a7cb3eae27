"""Merges that PEFT has too, against PEFT itself: on a model with the exported adapters, and function by function."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils

from lori_dist.adapter.adapter import Adapter
from lori_dist.integrations.peft import export
from lori_dist.merges import merge
from lori_dist.merges._entries import total, trim, vote
from tests.integrations.made import trained
from tests.models import tiny_llama

# peft 0.21 asks transformers 5.23 for a property under the name it is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ("q_proj", "k_proj", "up_proj")


@pytest.fixture(params=["one A each", "one A for all"])
def tasks(request: pytest.FixtureRequest) -> list[Adapter]:
    """Of unequal alpha."""
    made = []
    for number, alpha in enumerate((8.0, 2.0, 5.0)):
        seed = number if request.param == "one A each" else 7
        task = trained(tiny_llama(), f"t{number}", seed=number, alpha=alpha, targets=TARGETS, density=1.0)
        if seed != number:
            other = trained(tiny_llama(), "a", seed=seed, targets=TARGETS, density=1.0).blocks[0]
            task = with_a_of(task, other.checksums, seed)
        made.append(task)
    return made


def with_a_of(task: Adapter, checksums: Any, seed: int) -> Adapter:
    return replace(task, blocks=(replace(task.blocks[0], seed=seed, checksums=checksums),))


def merged_by_peft(tasks: list[Adapter], folder: Path, weights: list[float], **how: Any) -> PeftModel:
    for number, task in enumerate(tasks):
        export(task, folder / str(number), base_model_name="tiny")
    model = PeftModel.from_pretrained(tiny_llama(), folder / "0", adapter_name="t0")
    for number in range(1, len(tasks)):
        model.load_adapter(folder / str(number), adapter_name=f"t{number}")
    names = [f"t{number}" for number in range(len(tasks))]
    model.add_weighted_adapter(names, weights, "merged", svd_full_matrices=False, **how)
    return model


@pytest.mark.parametrize(
    ("weights", "theirs", "method", "options"),
    [
        ([0.5, 0.3, 2.0], {"combination_type": "cat"}, "concat", {}),
        ([0.5, -0.3, 2.0], {"combination_type": "cat"}, "linear", {}),
        ([0.5, 0.3, 2.0], {"combination_type": "linear"}, "peft_linear", {}),
        ([0.5, -0.3, 2.0], {"combination_type": "linear"}, "peft_linear", {}),
        ([0.5, -0.3, 2.0], {"combination_type": "svd", "svd_rank": 3}, "svd", {"rank": 3}),
        (
            [1.0, 1.0, 1.0],
            {"combination_type": "ties_svd", "svd_rank": 20, "density": 0.5},
            "ties",
            {"density": 0.5, "space": "dense", "rank": 20},
        ),
        (
            [1.0, 1.0, 1.0],
            {"combination_type": "ties_svd", "svd_rank": 5, "density": 0.5, "majority_sign_method": "frequency"},
            "ties",
            {"density": 0.5, "space": "dense", "rank": 5, "elect": "frequency"},
        ),
        (
            [0.5, -0.3, 2.0],
            {"combination_type": "magnitude_prune_svd", "svd_rank": 20, "density": 0.25},
            "magnitude",
            {"density": 0.25, "space": "dense", "rank": 20},
        ),
    ],
)
def test_the_merge_is_pefts(
    tasks: list[Adapter],
    tmp_path: Path,
    weights: list[float],
    theirs: dict[str, Any],
    method: str,
    options: dict[str, Any],
) -> None:
    model = merged_by_peft(tasks, tmp_path, weights, **theirs)
    merged = merge(tasks, method=method, options=options, weights=weights)
    for module in merged.shapes:
        wanted = model.base_model.model.get_submodule(module).get_delta_weight("merged").detach()
        torch.testing.assert_close(merged.delta(module), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_merge_goes_to_peft_with_its_outputs(tasks: list[Adapter], tmp_path: Path) -> None:
    """Of ranks that differ between modules."""
    merged = merge(tasks, method="svd", weights=[0.5, -0.3, 2.0])
    export(merged, tmp_path / "out", base_model_name="tiny")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    for module in merged.shapes:
        wanted = model.base_model.model.get_submodule(module).get_delta_weight("default").detach()
        torch.testing.assert_close(merged.delta(module), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
def test_entry_by_entry_the_functions_are_pefts(density: float, elect: Any) -> None:
    """Where nothing is zero, and all weights are 1: PEFT counts zeros, and elects without weights."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(12, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    ones = torch.ones(3, dtype=torch.float64)
    trimmed = [trim(x, density) for x in xs]
    assert torch.equal(vote(trimmed, elect=elect), merge_utils.ties(xs, ones, density, elect))
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    weighted = [x * weight for x, weight in zip(trimmed, weights, strict=True)]
    torch.testing.assert_close(total(weighted), merge_utils.magnitude_prune(xs, weights, density), rtol=0, atol=1e-14)
