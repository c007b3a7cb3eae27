from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lori_dist import tensors
from lori_dist.tensors import Stored, metadata, stored, write

NAMES = {"a": (torch.float32, (3, 5)), "b": (torch.bfloat16, (7,)), "c": (torch.uint8, ()), "d": (torch.int32, (0, 2))}


def content(name: str) -> torch.Tensor:
    dtype, shape = NAMES[name]
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) + 1


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, NAMES, (content(name) for name in NAMES), {"key": "välue"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "välue"}
        for name in NAMES:
            found = file.get_tensor(name)
            assert found.dtype == NAMES[name][0]
            assert torch.equal(found, content(name))
    assert metadata(path) == {"key": "välue"}
    assert list(tmp_path.iterdir()) == [path]


def test_pieces_may_be_of_any_size(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    write(whole, {"a": NAMES["a"]}, [content("a")], {})
    write(pieces, {"a": NAMES["a"]}, content("a").flatten().split(4), {})
    assert whole.read_bytes() == pieces.read_bytes()


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=40)
def test_any_range_is_read_in_any_dtype(place: Stored, first: int, last: int, dtype: torch.dtype) -> None:
    start, end = sorted((first, last))
    into = torch.empty(end - start, dtype=dtype)
    place.read(into, start)
    assert torch.equal(into, VALUES[start:end].to(dtype))


VALUES = torch.randn(60, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """VALUES in a file, of which seven at most are read at once."""
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_file({"other": torch.zeros(3), "x": VALUES.view(4, 15)}, path)
    size, tensors.PIECE_BYTES = tensors.PIECE_BYTES, 28
    yield stored(path)["x"]
    tensors.PIECE_BYTES = size


def test_equal_tensors_are_told_from_others(place: Stored, tmp_path: Path) -> None:
    other = VALUES.clone()
    other[-1] += 1
    save_file({"same": VALUES.view(4, 15).clone(), "flat": VALUES, "other": other.view(4, 15)}, tmp_path / "y")
    found = stored(tmp_path / "y")
    assert [place.equals(found[name]) for name in ("same", "flat", "other")] == [True, False, False]


def fail_in_the_middle() -> Iterator[torch.Tensor]:
    yield torch.zeros(3)
    raise KeyError("in the middle")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(KeyError):
        write(path, {"x": (torch.float32, (6,))}, fail_in_the_middle(), {})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 7, b"\xff" * 40, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"no file"])
def test_what_is_no_file_of_the_format_is_refused(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        stored(path)


def test_a_file_that_ends_early_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": VALUES}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors is cut off"):
        stored(path)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": VALUES}, path)
    where = stored(path)["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="ends too early"):
        where.read(torch.empty(60))
