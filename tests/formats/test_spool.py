"""Parts whose tensors wait in a file."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.update import Part
from lori_dist.errors import AdapterError
from lori_dist.formats.lazy import StoredEntries, StoredProjection
from lori_dist.formats.spool import Spool

A = torch.arange(10, dtype=torch.float32).view(2, 5)
PART = Part(
    name="task",
    module="q",
    shape=(6, 5),
    seed=None,
    rank=2,
    alpha=2.0,
    entries=Entries(index=torch.tensor([0, 3, 11], dtype=torch.int32), values=torch.tensor([1.0, -2.0, 0.5])),
    checksum=checksum(A),
    stored=A,
)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(path=tmp_path / "waiting", out=tmp_path / "merged")


def test_what_is_kept_comes_back_also_in_another_process(spool: Spool) -> None:
    for part in (spool.keep(PART), pickle.loads(pickle.dumps(spool.keep(PART)))):
        assert isinstance(part.entries, StoredEntries) and isinstance(part.stored, StoredProjection)
        assert torch.equal(part.entries.index, PART.entries.index)
        assert torch.equal(part.entries.values, PART.entries.values)
        assert torch.equal(part.a(), A.double())
        assert torch.equal(part.b(), PART.b())


def test_what_lies_in_a_file_stays_there_and_is_let_go_of(spool: Spool) -> None:
    part = spool.keep(PART)
    size = spool.path.stat().st_size
    assert part.entries.values.numel() == 3  # read
    again = spool.keep(part)
    assert again.entries.place == part.entries.place
    assert again.entries._found is None
    assert spool.path.stat().st_size == size
    assert spool.keep(dataclasses.replace(PART, entries=None, stored=None)).entries is None


def test_what_no_file_could_hold_is_refused_under_the_name_of_the_result(spool: Spool) -> None:
    endless = Entries(index=PART.entries.index, values=torch.tensor([1.0, float("inf"), 0.0]))
    with pytest.raises(AdapterError, match=r"merged: B of q in task has values that are not finite as torch.float32"):
        spool.keep(dataclasses.replace(PART, entries=endless))
    nowhere = Spool(path=spool.path / "none" / "waiting", out=spool.out)
    with pytest.raises(AdapterError, match=r"merged: it cannot be written"):
        nowhere.keep(PART)
