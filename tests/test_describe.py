"""What `lori show` says about merges."""

from pathlib import Path

import pytest
import safetensors.torch

from lori_dist import describe
from lori_dist.formats import native
from lori_dist.merges import merge
from tests.merges.made import adapter, block


@pytest.mark.parametrize(
    ("method", "shared", "form"),
    [
        ("concat", False, "2 x sparse B on a seed"),
        ("linear", True, "1 x sparse B on a seed"),
        ("ties", True, "1 x sparse B on a seed"),
        ("svd", True, "1 x dense B on a seed"),
        ("pico", True, "1 x dense B on a seed"),
        ("svd", False, "1 x A and B stored"),
        ("ties", False, "1 x A and B stored"),
    ],
)
def test_the_form_of_a_merge_and_its_bytes_are_shown(tmp_path: Path, method: str, shared: bool, form: str) -> None:
    tasks = [adapter(block(f"t{place}", seed=0 if shared else place, draw=place)) for place in range(2)]
    path = tmp_path / "merged"
    native.save(merge(tasks, method=method), path)
    shown = describe.adapter_file(path)
    size = sum(tensor.nbytes for tensor in safetensors.torch.load_file(path).values())
    assert f"\n  form: {form} ({size:,} bytes)\n" in shown
    assert f"{path.stat().st_size:,} bytes" in shown.split("\n")[0]
    table = [line for line in shown.split("\n") if line.endswith(form.partition(" x ")[2])]
    assert len(table) == int(form[0])


def test_every_merge_is_listed_with_its_options() -> None:
    shown = describe.methods()
    for line in (
        "core_space",
        "inner='task_arithmetic'",
        "density=0.2",
        "rank=None",
        "negate=()",
        "tolerance=1e-05",
    ):
        assert line in shown
