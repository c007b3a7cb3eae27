"""Masks that all ranks choose together are those of one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lori_dist import config, plugin
from lori_dist.adapter.per_task import of_a
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.config import Choice
from lori_dist.errors import LoriError
from lori_dist.masks import _select
from lori_dist.training import checkpoint, engine, masking
from lori_dist.training.engine import Part, Quantity
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.masks.oracle import DENSITIES, adapters, flat

PHASE = "calibrate"
FOREIGN = "tests.launched"
"""Its mask gets all of B."""
METHODS = [Choice(name=name) for name in plugin.names("masks")] + [Choice(name="random", options={"seed": 5})]
MANY = 16_000_000


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """As much of an engine as writes a state: each rank holds a part of every tensor."""

    values: Mapping[str, Tensor]
    world: World
    num_steps: int = 1

    def parts(self, quantity: Quantity) -> dict[str, Part]:
        found = {}
        for path, full in self.values.items():
            start = full.numel() * self.world.rank // self.world.size
            end = full.numel() * (self.world.rank + 1) // self.world.size
            found[path] = Part(start=start, data=full.flatten()[start:end])
        return found


def write(path: Path, values: Mapping[str, Tensor], world: World) -> None:
    holder: Any = Sharded(values=values, world=world)
    checkpoint.write_state(path, PHASE, holder, world, origin={}, quantities=("values",))


def choose(path: Path, world: World, mask: Choice, density: float) -> dict[str, Tensor]:
    chosen = config.Adapter(rank=1, density=density, mask=mask)
    return masking.choose(path, PHASE, origin={}, settings=chosen, world=world)


def alone(b: Mapping[str, Tensor], mask: Choice, density: float) -> dict[str, Tensor]:
    return plugin.find("masks", mask.name, "mask", "adapter.mask").load()(b, density=density, **mask.options)


def outcome(make: Callable[[], dict[str, Tensor]]) -> Any:
    """Masks, or the message of what is raised."""
    try:
        return flat(make())
    except LoriError as error:
        return str(error)


Case = tuple[dict[str, Tensor], Choice, float]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """What hypothesis makes: many ties and zeros, now and then what is no number."""
    made: list[Case] = []
    strange = st.one_of(st.none(), st.none(), st.sampled_from([float("nan"), float("inf")]))

    @given(adapters(), st.sampled_from(METHODS), DENSITIES, strange, st.integers(0, 100))
    @settings(max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def collect(b: dict[str, Tensor], mask: Choice, density: float, value: float | None, place: int) -> None:
        if value is not None:
            for tensor in list(b.values())[place % len(b) :]:
                tensor.view(-1)[place % tensor.numel() :] = value
        made.append((b, mask, density))

    collect()
    return made


def choose_all(cases: list[Case], folder: Path) -> tuple[list[Any], list[Any]]:
    """What ranks get together and what this one gets alone; everything is cut into pieces that are smaller than B."""
    world = from_environment()
    _select._PIECE, _select._GROUPS, masking.PIECE, engine.WINDOW = 5, 2, 7, 10
    together, by_itself = [], []
    for number, (b, mask, density) in enumerate(cases):
        path = folder / f"{number}.safetensors"
        write(path, {**b, of_a("layers.0.q"): torch.full((3,), 9.0)}, world)
        together.append(outcome(lambda: choose(path, world, mask, density)))  # noqa: B023  # called at once
        by_itself.append(outcome(lambda: alone(b, mask, density)))  # noqa: B023
    return together, by_itself


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_choose_together_what_one_chooses_alone(world_size: int, cases: list[Case], tmp_path: Path) -> None:
    assert {mask.name for _, mask, _ in cases} == set(plugin.names("masks"))
    for together, by_itself in run_distributed(choose_all, cases, tmp_path, world_size=world_size):
        assert together == by_itself
        assert any(isinstance(found, str) for found in together)


def choose_by_foreign(folder: Path) -> tuple[Any, Any]:
    world = from_environment()
    b = {"layers.0.q": torch.arange(12.0), "layers.0.v": torch.arange(20.0).flip(0)}
    write(folder / "x.safetensors", b, world)
    mask = Choice(name=FOREIGN, options={"mark": str(folder / "mark")})
    found = flat(choose(folder / "x.safetensors", world, mask, 0.25))
    return found, flat(alone(b, Choice(name="magnitude"), 0.25))


def test_a_mask_of_the_user_s_own_gets_all_of_b_on_the_first_rank(tmp_path: Path) -> None:
    for found, wanted in run_distributed(choose_by_foreign, tmp_path, world_size=2):
        assert found == wanted
    assert [path.name for path in tmp_path.glob("mark*")] == ["mark-0-of-2"]


def most_held(path: Path) -> tuple[int, int]:
    """Most bytes above those before: while B is written, each rank having half of it, and while its mask is chosen."""
    world = from_environment()
    _select._PIECE, engine.WINDOW = 2**16, 2**16  # else what is worked on at once is much of so small a B
    shared = {f"layers.{number}.q": torch.zeros(MANY // 8) for number in range(8)}
    for place, tensor in enumerate(shared.values()):
        tensor.copy_(torch.randn(tensor.numel(), generator=torch.Generator().manual_seed(place)))
    held = []
    for do in (lambda: write(path, shared, world), lambda: choose(path, world, Choice(name="magnitude"), 0.1)):
        do()  # the first time, as libraries then load code of their own
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        do()
        held.append(process_bytes("VmHWM") - before)
    return held[0], held[1]


def test_no_rank_holds_all_of_b(tmp_path: Path) -> None:
    size = 4 * MANY
    for writing, choosing in run_distributed(most_held, tmp_path / "x.safetensors", world_size=2):
        print(f"of B: {writing / size:.3f} while it is written, {choosing / size:.3f} while its mask is chosen")
        assert writing < 0.5 * size
        assert choosing < (0.5 + 2 * 0.125 + 0.2) * size  # half of B, its mask in bytes twice, and what is worked on
