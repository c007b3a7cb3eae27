"""What `lori show` says about merges."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from lori_dist import Adapter, describe
from lori_dist.adapter.adapter import Block, Entries
from lori_dist.adapter.projection import checksum
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.formats import native
from lori_dist.merges import merge
from tests.distributed import run_distributed
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


def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """An adapter with an A of its own for each of forty modules."""
    size, rank = 2048, 64
    shapes = {f"layers.{number}.q_proj": (size, size) for number in range(40)}
    block_ = Block(
        name="t",
        seed=None,
        rank=rank,
        alpha=1.0,
        entries={path: Entries(index=None, values=torch.ones(size * rank)) for path in shapes},
        projections={path: torch.ones(rank, size) for path in shapes},
        checksums={path: checksum(torch.ones(rank, size)) for path in shapes},
    )
    path = tmp_path / "adapter.safetensors"
    native.save(Adapter(shapes=shapes, blocks=(block_,), targets=("q_proj",)), path)
    assert path.stat().st_size > 40_000_000
    [grown] = run_distributed(growth, path, world_size=1, process_group=False)
    assert grown < 0.25 * path.stat().st_size


def growth(path: Path) -> int:
    """Bytes by which the process grows at most while it describes an adapter."""
    describe.adapter_file(path)  # and what is imported and cached
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    assert "A and B stored" in describe.adapter_file(path)
    return process_bytes("VmHWM") - before


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
