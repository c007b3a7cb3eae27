"""While a base is loaded, no process ever holds it as a whole, where the engine shards it."""

from pathlib import Path

import pytest

from lori_dist.training.world import from_environment
from tests.benchmarks import loading
from tests.distributed import run_distributed


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a model of more than a gigabyte in several files, and that model's bytes."""
    folder = tmp_path_factory.mktemp("bases")
    return folder, loading.make(folder)


def peak(folder: Path, engine: str) -> int:
    return loading.load(from_environment(), folder, engine)["peak_bytes"]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("engine", loading.SHARDED)
def test_a_rank_holds_its_share_and_little_more(engine: str, world_size: int, bases: tuple[Path, int]) -> None:
    folder, size = bases
    assert size > 10**9
    share = run_distributed(peak, folder, engine, world_size=world_size)[0] / size
    print(f"{engine} on {world_size}: at most {share:.3f} of the base")
    assert share < 1.2 / world_size


def test_a_base_on_every_rank_is_there_once(bases: tuple[Path, int]) -> None:
    folder, size = bases
    assert run_distributed(peak, folder, "ddp", world_size=2)[0] < 1.2 * size
