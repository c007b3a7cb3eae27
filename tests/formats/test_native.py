import hashlib
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import checksum
from lori_dist.errors import AdapterError
from lori_dist.formats.native import block_bytes, header, load, save

GOLDEN = Path(__file__).parent / "golden" / "adapter.safetensors"
GOLDEN_STORED = Path(__file__).parent / "golden" / "stored.safetensors"
CHECKSUM = "0123456789abcdef"


ONES = torch.ones(2)


def golden() -> Adapter:
    """What the golden file holds: two blocks that differ in everything, one module full, one empty, one partly kept."""
    shapes = {"layers.2.q_proj": (5, 7), "layers.10.q_proj": (3, 4), "lm_head": (2, 6)}
    blocks = (
        Block(
            name="math",
            seed=7,
            rank=3,
            alpha=6.0,
            entries={
                "layers.2.q_proj": Entries(
                    index=torch.tensor([0, 4, 9, 14], dtype=torch.int32), values=torch.tensor([1.0, -2.5, 0.125, -0.0])
                ),
                "layers.10.q_proj": Entries(index=None, values=torch.arange(9.0) / 4),
            },
            checksums={},
        ),
        Block(
            name="code",
            seed=2**64 - 1,
            rank=4,
            alpha=0.1,
            weight=-0.5,
            dtype=torch.bfloat16,
            entries={"lm_head": Entries(index=torch.tensor([7], dtype=torch.int32), values=torch.tensor([3.0]))},
            checksums={},
        ),
    )
    made = tuple(
        replace(block, checksums={name: checksum(block.projection(name, size)) for name, (_, size) in shapes.items()})
        for block in blocks
    )
    return Adapter(shapes=shapes, blocks=made, targets=("q_proj", "lm_head"), base={"name": "ünï", "layers": [2, None]})


def golden_stored() -> Adapter:
    """What the golden file of version 2 holds: a block without a seed, of two ranks, beside one with a seed."""
    shapes = {"q": (2, 3), "k": (1, 4), "v": (2, 2)}
    a = {"q": torch.tensor([[1.0, -2.0, 0.5], [0.0, -0.0, 3.0]]), "k": torch.tensor([[0.25, 0.5, -1.0, 2.0]])}
    stored = Block(
        name="svd",
        seed=None,
        rank=2,
        alpha=2.0,
        entries={
            "q": Entries(index=None, values=torch.tensor([1.0, 2.0, 3.0, -4.0])),
            "k": Entries(index=None, values=torch.tensor([0.5])),
        },
        checksums={name: checksum(matrix) for name, matrix in a.items()},
        projections=a,
    )
    seeded = Block(
        name="math",
        seed=7,
        rank=1,
        alpha=1.0,
        weight=0.25,
        entries={"v": Entries(index=torch.tensor([1], dtype=torch.int32), values=torch.tensor([9.0]))},
        checksums={},
    )
    checksums = {name: checksum(seeded.projection(name, size)) for name, (_, size) in shapes.items()}
    return Adapter(shapes=shapes, blocks=(stored, replace(seeded, checksums=checksums)), targets="all-linear")


def small_stored() -> Adapter:
    """As `small`, with its A stored, and one row of it less."""
    a = torch.tensor([[1.0, 2.0, -3.0, 0.5]])
    entries = {"q": Entries(index=torch.tensor([0, 3], dtype=torch.int32), values=torch.tensor([1.0, -4.0]))}
    block = Block(
        name="t",
        seed=None,
        rank=2,
        alpha=2.0,
        entries=entries,
        checksums={"q": checksum(a)},
        projections={"q": a},
    )
    return Adapter(shapes={"q": (5, 4)}, blocks=(block,), targets="all-linear")


def small() -> Adapter:
    index = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    entries = {"q": Entries(index=index, values=torch.tensor([1.0, 2.0, 3.0, -4.0]))}
    block = Block(name="t", seed=1, rank=2, alpha=2.0, entries=entries, checksums={"q": CHECKSUM})
    return Adapter(shapes={"q": (5, 4)}, blocks=(block,), targets="all-linear")


def with_entries(index: Any, values: Any) -> Adapter:
    """`small` with another B of its ten entries."""
    adapter = small()
    block = replace(adapter.blocks[0], entries={"q": Entries(index=index, values=values)})
    return replace(adapter, blocks=(block,))


def sparse(shapes: Mapping[str, tuple[int, int]], rank: int, density: float) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, (out_features, _) in shapes.items():
        index = (torch.rand(out_features * rank, generator=generator) < density).nonzero()[:, 0].int()
        entries[name] = Entries(index=index, values=torch.randn(index.numel(), generator=generator))
    block = Block(name="t", seed=1, rank=rank, alpha=1.0, entries=entries, checksums=dict.fromkeys(shapes, CHECKSUM))
    return Adapter(shapes=shapes, blocks=(block,), targets="all-linear")


def bits(tensor: Tensor) -> list[int]:
    return tensor.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]).tolist()


def plain(adapter: Adapter, dtype: torch.dtype | None = None) -> Any:
    """An adapter as nested lists that are equal if the adapters are the same, bit for bit and in the same order."""
    blocks = []
    for block in adapter.blocks:
        entries = {}
        for name, (out_features, _) in adapter.shapes.items():
            kept = block.entries.get(name)
            if kept is not None and kept.values.numel():
                full = kept.values.numel() == out_features * block.rank_of(name)
                positions = None if full or kept.index is None else (kept.index.dtype, kept.index.tolist())
                values = kept.values if dtype is None else kept.values.to(dtype)
                entries[name] = (positions, values.dtype, bits(values))
        about = (block.name, block.seed, block.rank, repr(block.alpha), repr(block.weight), block.dtype)
        stored = [
            (name, block.projections[name].shape, block.projections[name].dtype, bits(block.projections[name]))
            for name in entries
            if name in block.projections
        ]
        checksums = [
            block.checksums[name] if block.seed is not None or name in entries else None for name in adapter.shapes
        ]
        blocks.append((about, list(entries.items()), checksums, stored))
    return (list(adapter.shapes.items()), blocks, adapter.targets, adapter.base, adapter.generator)


# A reader and a writer that know nothing but the README.


def digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[int, str], np.ndarray]]:
    """The header and each dense B. Values float32 or bfloat16."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    outer = json.loads(data[8 : 8 + length])
    text = outer.pop("__metadata__")["lori"]
    about = json.loads(text)
    assert text.endswith(f',"digest":"{about["digest"]}"}}')
    assert about["digest"] == digest(text[: -len(',"digest":"0123456789abcdef"}')].encode())

    def tensor(name: str) -> bytes:
        start, end = outer.pop(name, {"data_offsets": (0, 0)})["data_offsets"]
        return data[8 + length + start : 8 + length + end]

    dense = {}
    for name, module in about["modules"].items():
        for number, block in enumerate(about["blocks"]):
            values, mask = tensor(f"{number}.{name}.values"), tensor(f"{number}.{name}.mask")
            assert module["digest"][number] == digest(values, mask)
            rank = module["rank"][number] if about["version"] == 2 else block["rank"]
            size = module["shape"][0] * rank
            a = tensor(f"{number}.{name}.a")
            if block["seed"] is None:
                width = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[block["dtype"]]
                assert len(a) == rank * module["shape"][1] * width
                assert module["projection"][number] == (digest(a) if rank else None)
            assert (len(a) > 0) == (block["seed"] is None and module["kept"][number] > 0)
            if mask:
                packed = zlib.decompress(mask)
                assert len(packed) == (size + 7) // 8
                kept = [i for i in range(8 * len(packed)) if packed[i // 8] >> i % 8 & 1]
            else:
                kept = list(range(module["kept"][number]))
            if about["values_dtype"] == "bfloat16":
                words = np.frombuffer(values, "<u2").astype("<u4") << 16
            else:
                words = np.frombuffer(values, "<u4")
            assert len(words) == len(kept) == module["kept"][number]
            b = np.zeros(size, "<f4")
            b[kept] = words.view("<f4")
            dense[number, name] = b.reshape(module["shape"][0], rank)
    assert not outer
    return about, dense


def small_header() -> dict[str, Any]:
    return {
        "format": "lori_dist.adapter",
        "version": 1,
        "generator": "philox4x64-10",
        "distribution": "uniform",
        "values_dtype": "float32",
        "targets": "all-linear",
        "base": {},
        "blocks": [{"name": "t", "seed": 1, "rank": 2, "alpha": 2.0, "weight": 1.0, "dtype": "float32"}],
        "modules": {"q": {"shape": [5, 4], "kept": [4], "projection": [CHECKSUM], "digest": [None]}},
    }


def packed(*parts: int) -> Tensor:
    return torch.tensor(list(zlib.compress(bytes(parts))), dtype=torch.uint8)


def small_stored_header() -> dict[str, Any]:
    about = small_header()
    about["version"] = 2
    about["blocks"][0]["seed"] = None
    projection = checksum(small_stored().blocks[0].projections["q"])
    about["modules"]["q"] = {"shape": [5, 4], "rank": [1], "kept": [2], "projection": [projection], "digest": [None]}
    return about


def small_stored_tensors() -> dict[str, Tensor]:
    return {
        "0.q.values": torch.tensor([1.0, -4.0]),
        "0.q.mask": packed(0b1001),
        "0.q.a": small_stored().blocks[0].projections["q"].clone(),
    }


def small_tensors() -> dict[str, Tensor]:
    mask = zlib.compress(bytes([0b00001101, 0b00000010]))
    return {
        "0.q.values": torch.tensor([1.0, 2.0, 3.0, -4.0]),
        "0.q.mask": torch.tensor(list(mask), dtype=torch.uint8),
    }


def seal(about: Any, tensors: Mapping[str, Tensor]) -> str:
    """The header's text with every digest as it should be."""
    about = json.loads(json.dumps(about))
    for name, module in about["modules"].items() if isinstance(about.get("modules"), dict) else ():
        if isinstance(module, dict) and isinstance(module.get("digest"), list):
            for number, given in enumerate(module["digest"]):
                parts = [tensors.get(f"{number}.{name}.{kind}") for kind in ("values", "mask")]
                found = [
                    part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    for part in parts
                    if part is not None
                ]
                module["digest"][number] = digest(*found) if given is None else given
    return seal_text(json.dumps(about, separators=(",", ":")))


def seal_text(text: str) -> str:
    body = text.removesuffix("}")
    return f'{body},"digest":"{digest(body.encode())}"}}'


def write(path: Path, text: str, tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(safetensors.torch.save(dict(tensors), metadata={"lori": text}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


# What goes in comes out.

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def entries(draw: st.DrawFn, num_entries: int) -> Entries | None:
    kind = draw(st.sampled_from(["absent", "none", "some", "all", "indexed"]))
    if kind == "absent":
        return None
    kept = {"none": [], "some": None}.get(kind, range(num_entries))
    if kept is None:
        kept = sorted(draw(st.sets(st.integers(0, num_entries - 1))))
    width = draw(st.sampled_from([16, 32]))  # values that bfloat16 holds, and any
    numbers = [draw(st.floats(width=width, allow_nan=False, allow_infinity=False)) for _ in kept]
    index = None if kind == "all" else torch.tensor(kept, dtype=torch.int32)
    return Entries(index=index, values=torch.tensor(numbers, dtype=torch.float32))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 2**12))
    shapes = draw(st.dictionaries(NAMES, sizes, min_size=1, max_size=4))
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 5))
        is_stored = draw(st.booleans())
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        ranks = {name: draw(st.integers(1, rank)) if is_stored else rank for name in shapes}
        made = {name: draw(entries(shape[0] * ranks[name])) for name, shape in shapes.items()}
        projections = {}
        for name, (_, in_features) in shapes.items():
            if is_stored and made[name] is not None:
                projections[name] = torch.full((ranks[name], in_features), draw(st.integers(-3, 3)), dtype=dtype)
        block = Block(
            name=draw(NAMES),
            seed=None if is_stored else draw(st.integers(0, 2**64 - 1)),
            rank=rank,
            alpha=draw(FINITE),
            weight=draw(FINITE),
            dtype=dtype,
            entries={name: kept for name, kept in made.items() if kept is not None},
            checksums={name: checksum(a) for name, a in projections.items()}
            if is_stored
            else {name: digest(name.encode()) for name in shapes},
            projections=projections,
        )
        blocks.append(block)
    targets = draw(st.just("all-linear") | st.lists(NAMES, min_size=1, max_size=3).map(tuple))
    return Adapter(
        shapes=shapes, blocks=tuple(blocks), targets=targets, base=draw(st.dictionaries(NAMES, JSON, max_size=3))
    )


# A function-scoped path is fine here: every example writes the file anew.
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_load_gives_back_what_was_saved(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    try:
        save(adapter, path, dtype=dtype)
    except AdapterError as error:  # the largest float32 values round to infinity in bfloat16
        assert dtype == torch.bfloat16 and "not finite as torch.bfloat16" in str(error)
        return
    loaded = load(path)
    assert plain(loaded) == plain(adapter, dtype)
    saved = path.read_bytes()
    save(loaded, path, dtype=dtype)
    assert path.read_bytes() == saved
    about, dense = read(path)
    assert header(path) == {key: value for key, value in about.items() if key != "digest"}
    for number, block in enumerate(loaded.blocks):
        for name, kept in block.entries.items():
            b = kept.dense(loaded.shapes[name][0], block.rank_of(name)).float()
            assert torch.equal(b, torch.from_numpy(dense[number, name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_stored_in_the_dtype_asked_for(path: Path, dtype: torch.dtype) -> None:
    save(golden(), path, dtype=dtype)
    assert plain(load(path)) == plain(golden(), dtype)
    assert header(path)["values_dtype"] == str(dtype).removeprefix("torch.")


def test_an_adapter_that_keeps_nothing_is_a_file_without_tensors(path: Path) -> None:
    adapter = with_entries(torch.empty(0, dtype=torch.int32), torch.empty(0))
    save(adapter, path)
    assert load(path).blocks[0].entries == {}
    assert safetensors.torch.load_file(path) == {}


def test_only_a_partly_kept_module_has_a_mask(path: Path) -> None:
    save(golden(), path)
    assert set(safetensors.torch.load_file(path)) == {
        "0.layers.2.q_proj.values",
        "0.layers.2.q_proj.mask",
        "0.layers.10.q_proj.values",
        "1.lm_head.values",
        "1.lm_head.mask",
    }


def test_parameters_views_and_shared_values_can_be_saved(path: Path) -> None:
    values = nn.Parameter(torch.arange(20.0))
    block = replace(small().blocks[0], entries={"q": Entries(index=None, values=values[::2])})
    save(replace(small(), blocks=(block, block)), path)
    first, second = load(path).blocks
    assert first.entries["q"].values.tolist() == second.entries["q"].values.tolist() == list(range(0, 20, 2))


def test_modules_and_tensors_whose_names_look_alike_stay_apart(path: Path) -> None:
    names = ["a", "a.values", "a.mask", "0.a", "../a", "values", "__metadata__"]
    kept = {
        name: Entries(index=torch.tensor([i], dtype=torch.int32), values=torch.ones(1)) for i, name in enumerate(names)
    }
    block = replace(small().blocks[0], rank=8, entries=kept, checksums=dict.fromkeys(names, CHECKSUM))
    adapter = Adapter(shapes=dict.fromkeys(names, (1, 1)), blocks=(block,), targets="all-linear")
    save(adapter, path)
    assert plain(load(path)) == plain(adapter)


def test_a_default_device_does_not_matter(path: Path) -> None:
    adapter = small()
    with torch.device("meta"):
        save(adapter, path)
        loaded = load(path)
    assert plain(loaded) == plain(adapter)


def test_a_loaded_adapter_does_not_change_with_the_file(path: Path) -> None:
    save(small(), path)
    adapter = load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert plain(adapter) == plain(small())


def test_header_lengths_that_look_like_a_pickle_or_a_zip_are_no_obstacle(path: Path) -> None:
    starts = set()
    for padding in range(0, 120, 8):
        save(replace(small(), base={"": "x" * padding}), path)
        starts.add(path.read_bytes()[:2])
        assert load(path).base == {"": "x" * padding}
    assert b"\x80\x02" in starts


# The golden file: another answer is another format.


def test_golden_file_loads_to_the_same_adapter_for_ever() -> None:
    assert plain(load(GOLDEN)) == plain(golden())


def test_golden_header() -> None:
    about = header(GOLDEN)
    assert [about[key] for key in ("format", "version", "generator", "distribution", "values_dtype")] == [
        "lori_dist.adapter",
        1,
        "philox4x64-10",
        "uniform",
        "float32",
    ]
    assert about["targets"] == ["q_proj", "lm_head"]
    assert about["blocks"][1] == {
        "name": "code",
        "seed": 2**64 - 1,
        "rank": 4,
        "alpha": 0.1,
        "weight": -0.5,
        "dtype": "bfloat16",
    }
    assert list(about["modules"]) == ["layers.2.q_proj", "layers.10.q_proj", "lm_head"]
    assert about["modules"]["lm_head"]["shape"] == [2, 6]
    assert [module["kept"] for module in about["modules"].values()] == [[4, 0], [9, 0], [0, 1]]


def test_golden_file_reads_with_nothing_but_the_readme() -> None:
    about, dense = read(GOLDEN)
    adapter = golden()
    for number, block in enumerate(adapter.blocks):
        for name, (out_features, in_features) in adapter.shapes.items():
            a = block.projection(name, in_features)
            assert about["modules"][name]["projection"][number] == digest(a.view(torch.uint8).numpy().tobytes())
            kept = block.entries.get(name)
            b = torch.zeros(out_features, block.rank) if kept is None else kept.dense(out_features, block.rank)
            assert torch.equal(torch.from_numpy(dense[number, name]), b)


def test_a_file_written_from_the_readme_alone_loads(path: Path) -> None:
    write(path, seal(small_header(), small_tensors()), small_tensors())
    assert plain(load(path)) == plain(small())


@pytest.mark.parametrize("field", ["alpha", "weight"])
def test_whole_numbers_may_be_written_without_a_point(path: Path, field: str) -> None:
    about = small_header()
    about["blocks"][0][field] = 3
    write(path, seal(about, small_tensors()), small_tensors())
    assert repr(getattr(load(path).blocks[0], field)) == "3.0"


def test_other_metadata_is_ignored(path: Path) -> None:
    text = seal(small_header(), small_tensors())
    path.write_bytes(safetensors.torch.save(small_tensors(), metadata={"lori": text, "format": "pt"}))
    assert plain(load(path)) == plain(small())


# Size.


def mask_bits(path: Path, adapter: Adapter) -> float:
    """Per entry of B."""
    tensors = safetensors.torch.load_file(path)
    return 8 * sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".mask")) / adapter.total


@pytest.mark.parametrize(("density", "limit"), [(0.01, 0.13), (0.1, 0.5), (0.5, 1.001)])
def test_a_random_mask_takes_little_more_than_its_entropy(path: Path, density: float, limit: float) -> None:
    adapter = sparse({"down_proj": (28672, 8)}, 32, density)
    save(adapter, path)
    assert mask_bits(path, adapter) < limit
    assert plain(load(path)) == plain(adapter)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_mask_of_whole_rows_or_columns_takes_much_less(path: Path, dim: int) -> None:
    kept = torch.rand(8192, 1) < 0.1 if dim == 0 else torch.arange(32) % 9 == 4
    index = kept.expand(8192, 32).flatten().nonzero()[:, 0].int()
    adapter = sparse({"q": (8192, 8)}, 32, 0.0)
    block = replace(adapter.blocks[0], entries={"q": Entries(index=index, values=torch.ones(index.numel()))})
    adapter = replace(adapter, blocks=(block,))
    save(adapter, path)
    assert mask_bits(path, adapter) < 0.06
    assert plain(load(path)) == plain(adapter)


def test_all_but_values_and_masks_takes_few_bytes(path: Path) -> None:
    shapes = {f"model.layers.{i}.self_attn.{name}_proj": (128, 128) for i in range(14) for name in "qkvo"}
    save(sparse(shapes, 16, 0.1), path)
    payload = sum(tensor.nbytes for tensor in safetensors.torch.load_file(path).values())
    assert path.stat().st_size - payload < 400 * len(shapes)


def test_bytes_are_told_by_block(path: Path) -> None:
    for adapter in (golden(), golden_stored()):
        save(adapter, path)
        tensors = safetensors.torch.load_file(path)
        wanted = [0, 0]
        for name, tensor in tensors.items():
            wanted[int(name[0])] += tensor.nbytes
        assert block_bytes(path) == tuple(wanted)


# A that is stored: version 2.


def test_only_a_block_without_a_seed_makes_a_file_of_version_2(path: Path) -> None:
    for adapter, version in ((golden(), 1), (small_stored(), 2), (golden_stored(), 2)):
        save(adapter, path)
        assert header(path)["version"] == version


def test_golden_file_of_version_2_loads_to_the_same_adapter_for_ever(path: Path) -> None:
    assert plain(load(GOLDEN_STORED)) == plain(golden_stored())
    save(golden_stored(), path)
    assert path.read_bytes() == GOLDEN_STORED.read_bytes()
    about, dense = read(GOLDEN_STORED)
    assert [block["seed"] for block in about["blocks"]] == [None, 7]
    assert [module["rank"] for module in about["modules"].values()] == [[2, 1], [1, 1], [0, 1]]
    assert [module["kept"] for module in about["modules"].values()] == [[4, 0], [1, 0], [0, 1]]
    assert dense[0, "q"].tolist() == [[1.0, 2.0], [3.0, -4.0]]


def test_a_file_of_version_2_written_from_the_readme_alone_loads(path: Path) -> None:
    write(path, seal(small_stored_header(), small_stored_tensors()), small_stored_tensors())
    assert plain(load(path)) == plain(small_stored())
    save(small_stored(), path)
    assert plain(load(path)) == plain(small_stored())


def test_version_2_may_have_no_stored_a(path: Path) -> None:
    about = small_header()
    about["version"] = 2
    about["modules"]["q"] |= {"rank": [2]}
    write(path, seal(about, small_tensors()), small_tensors())
    assert plain(load(path)) == plain(small())


def test_a_stored_a_without_entries_is_not_written(path: Path) -> None:
    adapter = small_stored()
    empty = Entries(index=torch.empty(0, dtype=torch.int32), values=torch.empty(0))
    for entries in ({"q": empty}, {}):
        save(replace(adapter, blocks=(replace(adapter.blocks[0], entries=entries),)), path)
        assert safetensors.torch.load_file(path) == {}
        (block,) = load(path).blocks
        assert (block.seed, block.projections, block.checksums, block.rank_of("q")) == (None, {}, {}, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"projections": {}}, r"A of q in block 0 is missing; without a seed, give it as a plain torch.float32 matrix"),
        ({"projections": {"q": torch.ones(1, 4).double()}}, r"A of q in block 0 is a Tensor, torch.float64 \(1, 4\)"),
        ({"projections": {"q": torch.ones(4)}}, r"A of q in block 0 is a Tensor, torch.float32 \(4,\)"),
        ({"projections": {"q": torch.ones(1, 4, device="meta")}}, "on meta"),
        ({"projections": {"q": torch.ones(1, 5)}}, r"shape \(1, 5\); wanted at most 2 rows, and 4 columns"),
        ({"projections": {"q": torch.ones(3, 4)}}, r"shape \(3, 4\); wanted at most 2 rows, and 4 columns"),
        ({"projections": {"q": torch.ones(0, 4)}}, r"shape \(0, 4\); wanted"),
        ({"projections": {"q": torch.full((1, 4), torch.nan)}}, "A of q in block 0 has values that are not finite"),
        (
            {"projections": {"q": torch.ones(2, 4)}, "entries": {"q": Entries(index=None, values=ONES)}},
            "2 values for 10",
        ),
    ],
)
def test_a_stored_a_that_does_not_fit_is_refused(path: Path, change: dict[str, Any], match: str) -> None:
    adapter = small_stored()
    with pytest.raises(AdapterError, match=match):
        save(replace(adapter, blocks=(replace(adapter.blocks[0], **change),)), path)


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (["version"], 1, r"blocks\[0\].seed is None"),
        (["blocks", 0, "seed"], 1, "module q: rank is 1; it must be an integer from 2 to 2"),
        (["blocks", 0, "seed"], "none", r"blocks\[0\].seed is 'none'"),
        (["blocks", 0, "rank"], 2**40, r"blocks\[0\].rank is 1099511627776"),
        (["modules", "q", "rank"], [3], "module q: rank is 3; it must be an integer from 0 to 2"),
        (["modules", "q", "rank"], [2], "the mask of B of q in block 0 is shorter than its 10 entries"),
        (["modules", "q", "rank"], [0], "module q: kept is 2; it must be an integer from 0 to 0"),
        (["modules", "q", "rank"], [-1], "rank is -1"),
        (["modules", "q", "rank"], [True], "rank is True"),
        (["modules", "q", "rank"], [1, 1], "rank is of type list; it must be an array of 1"),
        (["modules", "q", "rank"], 1, "rank is 1; it must be an array of 1"),
        (["modules", "q", "kept"], [0], "module q: kept is 0; it must be an integer from 1 to 5"),
        (["modules", "q", "kept"], [6], "kept is 6; it must be an integer from 1 to 5"),
        (["modules", "q", "projection"], [None], "projection is None; it must be 16 digits"),
        (["modules", "q", "projection"], [CHECKSUM], "A of q in block 0 does not match its checksum"),
        (["modules", "q", "shape"], [5, 3], r"A of q in block 0 has the shape \(1, 4\), its header has \(1, 3\)"),
        (["extra"], {}, "extra is not known in version 2; update lori_dist"),
    ],
)
def test_hostile_headers_of_version_2_are_refused(path: Path, keys: list[Any], value: Any, match: str) -> None:
    about = small_stored_header()
    inner: Any = about
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write(path, seal(about, small_stored_tensors()), small_stored_tensors())
    with pytest.raises(AdapterError, match=match):
        load(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"0.q.a": None}, "tensor 0.q.a is missing"),
        ({"0.k.a": ONES}, "tensor 0.k.a is not in the header"),
        (
            {"0.q.a": torch.ones(4)},
            "tensor 0.q.a is torch.float32 with 1 dimensions; it must be torch.float32 with two",
        ),
        ({"0.q.a": torch.ones(1, 4).bfloat16()}, "tensor 0.q.a is torch.bfloat16"),
        ({"0.q.a": torch.ones(4, 1)}, r"A of q in block 0 has the shape \(4, 1\), its header has \(1, 4\)"),
        ({"0.q.a": torch.ones(1, 4)}, "A of q in block 0 does not match its checksum"),
    ],
)
def test_hostile_tensors_of_version_2_are_refused(path: Path, change: dict[str, Tensor | None], match: str) -> None:
    tensors = {name: tensor for name, tensor in (small_stored_tensors() | change).items() if tensor is not None}
    write(path, seal(small_stored_header(), tensors), tensors)
    with pytest.raises(AdapterError, match=match):
        load(path)


def test_a_stored_a_that_is_not_finite_is_refused(path: Path) -> None:
    about, a = small_stored_header(), torch.tensor([[1.0, torch.inf, 0.0, 0.0]])
    about["modules"]["q"]["projection"] = [checksum(a)]
    tensors = small_stored_tensors() | {"0.q.a": a}
    write(path, seal(about, tensors), tensors)
    with pytest.raises(AdapterError, match="A of q in block 0 has values that are not finite"):
        load(path)


def test_every_flipped_bit_of_version_2_is_refused(path: Path) -> None:
    save(small_stored(), path)
    data = path.read_bytes()
    survived = [
        (position, bit)
        for position, byte in enumerate(data)
        for bit in range(8)
        if load_changed(path, data, position, byte ^ 1 << bit) is not None
    ]
    assert survived == []


@pytest.mark.parametrize("keys", [[], ["blocks", 0], ["modules", "q"]])
def test_every_field_of_version_2_is_required(path: Path, keys: list[Any]) -> None:
    inner: Any = small_stored_header()
    for key in keys:
        inner = inner[key]
    for field in inner:
        about = small_stored_header()
        part: Any = about
        for key in keys:
            part = part[key]
        del part[field]
        write(path, seal(about, small_stored_tensors()), small_stored_tensors())
        with pytest.raises(AdapterError, match=field):
            load(path)


# Writing is all or nothing.


def test_saving_replaces_a_file_and_leaves_nothing_else(path: Path) -> None:
    save(golden(), path)
    save(small(), str(path))
    assert plain(load(str(path))) == plain(small())
    assert os.listdir(path.parent) == [path.name]


def test_a_refused_adapter_leaves_the_old_file_as_it_was(path: Path) -> None:
    save(small(), path)
    with pytest.raises(AdapterError):
        save(with_entries(None, torch.full((10,), torch.nan)), path)
    assert plain(load(path)) == plain(small())
    assert os.listdir(path.parent) == [path.name]


def test_the_file_gets_the_permissions_of_any_new_file(path: Path) -> None:
    save(small(), path)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no/adapter.safetensors: it cannot be written: No such file or directory"):
        save(small(), tmp_path / "no" / "adapter.safetensors")
    with pytest.raises(AdapterError, match="it cannot be written: Is a directory"):
        save(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("index", "values", "match"),
    [
        ([0, 10], ONES, r"B of q in block 0: index is not ascending within \[0, 10\)"),
        ([-1, 3], ONES, "not ascending"),
        ([3, 1], ONES, "not ascending"),
        ([3, 3], ONES, "not ascending"),
        ([1, 2, 3], ONES, "has 2 values, but 3 positions"),
        (torch.tensor([1, 2]), ONES, "index is torch.int64; give int32"),
        (torch.tensor([[1, 2]], dtype=torch.int32), ONES, r"index is a Tensor of shape \(1, 2\)"),
        ([1, 2], torch.ones(2, 1), r"values is a Tensor of shape \(2, 1\)"),
        ([1, 2], torch.ones(2, device="meta"), r"values is a Tensor of shape \(2,\) on meta"),
        ([1, 2], torch.tensor([1.0, torch.inf]), "not finite as torch.float32"),
        ([1, 2], torch.tensor([1.0, torch.nan]), "not finite"),
        (None, torch.ones(9), "has 9 values for 10 entries"),
        (None, torch.ones(0), "has 0 values for 10 entries"),
    ],
)
def test_entries_that_do_not_fit_are_refused(path: Path, index: Any, values: Tensor, match: str) -> None:
    index = torch.tensor(index, dtype=torch.int32) if isinstance(index, list) else index
    with pytest.raises(AdapterError, match=match) as error:
        save(with_entries(index, values), path)
    assert str(error.value).startswith(f"{path}: ")
    assert not path.exists()


def test_finite_values_whose_sum_is_not_are_stored(path: Path) -> None:
    values = torch.full((10,), torch.finfo(torch.float32).max)
    save(with_entries(None, values), path)
    assert torch.equal(load(path).blocks[0].entries["q"].values, values)


def test_values_too_large_for_the_dtype_are_refused(path: Path) -> None:
    with pytest.raises(AdapterError, match=r"not finite as torch.float16; write it as float32"):
        save(with_entries(None, torch.full((10,), 1e6)), path, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": -1}, r"blocks\[0\].seed is -1; it must be an integer from 0 to 18446744073709551615"),
        ({"seed": 2**64}, r"seed is 18446744073709551616"),
        ({"seed": 10**5000}, "seed is an integer of 16610 bits"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 2**30}, "more than 2147483647 entries"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"name": ""}, "name is ''"),
        ({"dtype": torch.int8}, "dtype is 'int8'; it must be one of float32, bfloat16, float16, float64"),
        ({"checksums": {}}, "module q: projection is None; it must be 16 digits"),
        ({"checksums": {"q": "0123456789ABCDEF"}}, "projection is '0123456789ABCDEF'"),
        ({"checksums": {"q": CHECKSUM, "k": CHECKSUM}}, "block t has k, which has no shape"),
        ({"entries": {"k": Entries(index=None, values=ONES)}}, "block t has k, which has no shape"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        save(replace(small(), blocks=(replace(small().blocks[0], **change),)), path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blocks": ()}, "blocks is \\[\\]; it must be an array with at least one block"),
        ({"shapes": {}, "blocks": (replace(small().blocks[0], entries={}, checksums={}),)}, "modules is of type dict"),
        ({"shapes": {"q": (5, 0)}}, "module q: shape is 0"),
        ({"shapes": {"q": (5,)}}, "module q: shape is of type list; it must be an array of 2"),
        ({"targets": ()}, "targets is \\[\\]"),
        ({"targets": ("q", "")}, "targets is ''"),
        ({"generator": "mersenne"}, "generator is 'mersenne', this program makes A with 'philox4x64-10'"),
        ({"base": {"a": float("nan")}}, "give `base` as plain JSON data"),
        ({"base": {"a": (1, 2)}}, "reading it gives something else"),
        ({"base": {1: 2}}, "reading it gives something else"),
        ({"base": {"a": ONES}}, "not JSON serializable"),
        ({"base": {"a": "\ud800"}}, "surrogates not allowed"),
        ({"base": {"a": "x" * 2**24}}, "at most 16777216 are read"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        save(replace(small(), **change), path)


def test_no_other_dtype_of_values(path: Path) -> None:
    with pytest.raises(AdapterError, match="values_dtype is 'float64'; it must be one of float32, bfloat16, float16"):
        save(small(), path, dtype=torch.float64)


# Damage: an AdapterError, whatever happened to the file.


def test_every_truncation_is_refused(path: Path) -> None:
    save(small(), path)
    data = path.read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        with pytest.raises(AdapterError, match="write it again"):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(AdapterError, match="write it again"):
        load(path)


def load_changed(path: Path, data: bytes, position: int, byte: int) -> Adapter | None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(bytes([byte]))
    try:
        return load(path)
    except AdapterError:
        return None
    finally:
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(data[position : position + 1])


def test_every_flipped_bit_is_refused(path: Path) -> None:
    save(small(), path)
    data = path.read_bytes()
    survived = [
        (position, bit)
        for position, byte in enumerate(data)
        for bit in range(8)
        if load_changed(path, data, position, byte ^ 1 << bit) is not None
    ]
    assert survived == []
    assert plain(load(path)) == plain(small())


def test_no_changed_byte_gives_another_adapter(path: Path) -> None:
    save(golden(), path)
    data = path.read_bytes()
    wanted = plain(golden())
    for position, byte in enumerate(data):
        for changed in {byte ^ 0xFF, 0, ord(" "), ord("9")} - {byte}:
            adapter = load_changed(path, data, position, changed)
            assert adapter is None or plain(adapter) == wanted, position


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_never_gives_another_adapter_or_error(path: Path, data: st.DataObject) -> None:
    save(golden(), path)
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=30))
    path.write_bytes(content)
    try:
        adapter = load(path)
    except AdapterError:
        return
    assert plain(adapter) == plain(golden())


def test_the_header_reads_without_the_tensors(path: Path) -> None:
    save(small(), path)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert header(path)["modules"]["q"]["kept"] == [4]
    with pytest.raises(
        AdapterError, match=r"adapter.safetensors: B of q in block 0 does not match its digest; the fil"
    ):
        load(path)


# Files of others.


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, match in [
        ("missing", "missing: it cannot be read: No such file or directory"),
        (".", "this is a folder; give the adapter file itself"),
        ("fifo", "is a named pipe, not a regular file"),
    ]:
        for read_it in (load, header):
            with pytest.raises(AdapterError, match=match):
                read_it(tmp_path / name)


def test_pickles_and_zips_are_refused_unopened(path: Path) -> None:
    for legacy in (False, True):
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(AdapterError, match="a pickle or a zip file, which is never opened"):
            load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(AdapterError, match="a pickle or a zip file"):
        load(path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("base_model.model.q_proj.lora_A.weight", "this is a LoRA adapter of PEFT"),
        ("model.embed_tokens.weight", "this is some other safetensors file: it has no 'lori' in its metadata"),
    ],
)
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_are_refused(path: Path, name: str, match: str, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({name: torch.ones(2, 2)}, path, metadata=metadata)
    for read_it in (load, header):
        with pytest.raises(AdapterError, match=match):
            read_it(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        (2**63).to_bytes(8, "little") + b"{}",
        (99_999_999).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"[" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (1_000_000).to_bytes(8, "little") + b"[" * 1_000_000,
        b"seed: 1\nrank: 2\n",
    ],
)
def test_what_is_no_safetensors_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="this is not a whole safetensors file"):
        load(path)


# Hostile files: every digest is right, the content is not.


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (["format"], "pt", "format is not 'lori_dist.adapter'"),
        (["version"], 4, "version is 4, this program reads 1, 2 and 3; update lori_dist"),
        (["version"], 2, "module q: rank is missing"),
        (["version"], True, "version is True"),
        (["version"], "1", "version is '1'"),
        (["version"], 10**400, "version is an integer of 1329 bits"),
        (["generator"], "philox4x32-10", "generator is 'philox4x32-10', this program makes A with 'philox4x64-10'"),
        (["distribution"], "normal", "distribution is 'normal', this program makes A with 'uniform'"),
        (["values_dtype"], "float64", "values_dtype is 'float64'"),
        (["values_dtype"], {}, "values_dtype is of type dict"),
        (["targets"], 3, "targets is 3"),
        (["targets"], [3], "targets is 3"),
        (["base"], [], "base is \\[\\]; it must be an object"),
        (["extra"], {}, "extra is not known in version 1; update lori_dist"),
        (["\x1b[31m"], {}, r"header: '\\x1b\[31m' is not known"),
        (["blocks"], {}, "blocks is of type dict"),
        (["blocks"], [], "blocks is \\[\\]"),
        (["blocks"], [3], r"blocks\[0\] is 3; it must be an object"),
        (["blocks", 0, "seed"], 2**64, r"blocks\[0\].seed is 18446744073709551616"),
        (["blocks", 0, "seed"], -1, "seed is -1"),
        (["blocks", 0, "seed"], 1.0, "seed is 1.0"),
        (["blocks", 0, "rank"], 0, "rank is 0"),
        (["blocks", 0, "rank"], -2, "rank is -2"),
        (["blocks", 0, "rank"], None, "rank is None"),
        (["blocks", 0, "rank"], 2**29, r"module q: shape \[5, 4\] with rank 536870912 gives more than"),
        (["blocks", 0, "alpha"], "2", "alpha is '2'; it must be a finite number"),
        (["blocks", 0, "alpha"], True, "alpha is True"),
        (["blocks", 0, "weight"], 10**400, "weight is an integer of 1329 bits"),
        (["blocks", 0, "dtype"], "int8", "dtype is 'int8'"),
        (["blocks", 0, "name"], 3, "name is 3"),
        (["blocks", 0, "left"], 3, r"blocks\[0\]: left is not known in version 1"),
        (["modules"], [], "modules is \\[\\]"),
        (["modules"], {}, "modules is of type dict"),
        (["modules", "q"], 3, "module q is 3; it must be an object"),
        (["modules", ""], {}, "modules is ''"),
        (["modules", "q", "rank"], 3, "module q: rank is not known"),
        (["modules", "q", "shape"], [5], "shape is of type list; it must be an array of 2"),
        (["modules", "q", "shape"], [5, -4], "shape is -4"),
        (["modules", "q", "shape"], [2.5, 4], "shape is 2.5"),
        (["modules", "q", "shape"], [2**31, 4], "shape is 2147483648"),
        (["modules", "q", "shape"], [5, 2**30], "gives more than 2147483647 entries"),
        (["modules", "q", "kept"], 4, "kept is 4; it must be an array of 1"),
        (["modules", "q", "kept"], [4, 4], "kept is of type list; it must be an array of 1"),
        (["modules", "q", "kept"], [11], "kept is 11; it must be an integer from 0 to 10"),
        (["modules", "q", "kept"], [-1], "kept is -1"),
        (["modules", "q", "kept"], [5], "B of q in block 0 has 4 values, its header says 5"),
        (["modules", "q", "kept"], [0], "tensor 0.q.mask is not in the header"),
        (["modules", "q", "kept"], [10], "tensor 0.q.mask is not in the header"),
        (["modules", "q", "projection"], ["x" * 16], "projection is 'x{16}'; it must be 16 digits"),
        (["modules", "q", "projection"], [CHECKSUM + "\n"], "projection is '0123456789abcdef"),
        (["modules", "q", "digest"], ["0" * 16], "B of q in block 0 does not match its digest"),
        (["modules", "q", "digest"], [5], "digest is 5"),
    ],
)
def test_hostile_headers_are_refused(path: Path, keys: list[Any], value: Any, match: str) -> None:
    about = small_header()
    inner: Any = about
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write(path, seal(about, small_tensors()), small_tensors())
    with pytest.raises(AdapterError, match=match) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), is_stored=st.booleans())
def test_any_value_in_any_place_is_a_header_or_an_error(path: Path, data: st.DataObject, is_stored: bool) -> None:
    about: Any = small_stored_header() if is_stored else small_header()
    tensors = small_stored_tensors() if is_stored else small_tensors()
    inner = about
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = data.draw(JSON)
    write(path, seal(about, tensors), tensors)
    try:
        loaded = load(path)
    except AdapterError as error:
        assert str(error).isprintable()
    else:
        save(loaded, path)


@pytest.mark.parametrize("keys", [[], ["blocks", 0], ["modules", "q"]])
def test_every_field_is_required(path: Path, keys: list[Any]) -> None:
    inner: Any = small_header()
    for key in keys:
        inner = inner[key]
    for field in inner:
        about = small_header()
        part: Any = about
        for key in keys:
            part = part[key]
        del part[field]
        write(path, seal(about, small_tensors()), small_tensors())
        with pytest.raises(AdapterError, match=field):
            load(path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"version":1', '"version":1,"version":1', "an object has the same key twice"),
        ('"base":{}', '"base":{"a":1,"a":1}', "an object has the same key twice"),
        ('"alpha":2.0', '"alpha":NaN', "NaN is not a finite number"),
        ('"alpha":2.0', '"alpha":-Infinity', "-Infinity is not a finite number"),
        ('"alpha":2.0', '"alpha":1e999', "1e999 is not a finite number"),
        ('"base":{}', '"base":{"a":1e999}', "1e999 is not a finite number"),
        ('"seed":1', '"seed":' + "1" * 5000, "not valid JSON"),
        ('"base":{}', '"base":{"a":"\\ud800"}', "surrogates not allowed"),
        ('"base":{}', '"base":{"\\udfff":1}', "surrogates not allowed"),
        ('"base":{}', '"base":' + "[" * 100_000, "not valid JSON"),
        ('"base":{}', '"base":{"a":' + "[" * 5000 + "]" * 5000 + "}", "not valid JSON"),
        ('"base":{}', '"base":{"a":"' + "x" * 2**24 + '"}', "at most 16777216 are read"),
        ('"version":1', '"version":3,"new":NaN', "not valid JSON"),
        ('"format"', "format", "not valid JSON"),
        ("{", "[{", "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(path: Path, old: str, new: str, match: str) -> None:
    sealed = seal(small_header(), small_tensors())
    text = json.dumps(
        {key: value for key, value in json.loads(sealed).items() if key != "digest"}, separators=(",", ":")
    )
    assert old in text
    write(path, seal_text(text.replace(old, new, 1)), small_tensors())
    with pytest.raises(AdapterError, match=match):
        load(path)


def test_a_header_without_its_digest_is_refused(path: Path) -> None:
    for text in ("", "{}", json.dumps(small_header()), "3", "[]"):
        write(path, text, small_tensors())
        with pytest.raises(AdapterError, match="the header does not match its digest"):
            load(path)
    for text in ("}", "[}", "3}", "null}"):
        write(path, seal_text(text), small_tensors())
        with pytest.raises(AdapterError):
            load(path)


def raw(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"0.q.values": None}, "tensor 0.q.values is missing"),
        ({"0.q.mask": None}, "tensor 0.q.mask is missing"),
        ({"0.k.values": ONES}, "tensor 0.k.values is not in the header"),
        ({"1.q.values": ONES}, "tensor 1.q.values is not in the header"),
        ({"extra.q": ONES}, "tensor extra.q is not in the header"),
        ({"0.q.projection": ONES}, "tensor 0.q.projection is not in the header"),
        (
            {"0.q.values": torch.ones(3)},
            "B of q in block 0 has 3 values, its header says 4; the file is damaged, write",
        ),
        ({"0.q.values": torch.ones(2, 2)}, "tensor 0.q.values is torch.float32 with 2 dimensions"),
        ({"0.q.values": torch.ones(4, dtype=torch.bfloat16)}, "tensor 0.q.values is torch.bfloat16"),
        ({"0.q.values": torch.ones(4, dtype=torch.float64)}, "tensor 0.q.values is torch.float64"),
        ({"0.q.values": torch.tensor([1.0, 2.0, torch.nan, 4.0])}, "values that are not finite"),
        ({"0.q.values": torch.tensor([1.0, 2.0, torch.inf, 4.0])}, "values that are not finite"),
        ({"0.q.mask": packed(0b1101, 2).float()}, "tensor 0.q.mask is torch.float32"),
        ({"0.q.mask": packed(0b1101, 2)[None]}, "tensor 0.q.mask is torch.uint8 with 2 dimensions"),
        ({"0.q.mask": packed(0b1100, 2)}, "B of q in block 0 has 4 values, its mask keeps 3"),
        ({"0.q.mask": packed(0b1111, 2)}, "B of q in block 0 has 4 values, its mask keeps more"),
        ({"0.q.mask": packed(0b1101, 4)}, "is longer than its 10 entries"),
        ({"0.q.mask": packed(0b1101, 2, 0)}, "is longer than its 10 entries"),
        ({"0.q.mask": packed(0b10101010)}, "is shorter than its 10 entries"),
        ({"0.q.mask": packed()}, "is shorter than its 10 entries"),
        ({"0.q.mask": raw(b"")}, "the stream ends early"),
        ({"0.q.mask": packed(0b1101, 2)[:-1]}, "the stream ends early"),
        ({"0.q.mask": torch.cat([packed(0b1101, 2), raw(b"\0")])}, "bytes follow the stream"),
        ({"0.q.mask": torch.cat([packed(0b1101, 2), packed(0)])}, "bytes follow the stream"),
        ({"0.q.mask": raw(b"\r\2")}, "cannot be unpacked"),
        ({"0.q.mask": raw(zlib.compress(b"\r\2")[2:-4])}, "cannot be unpacked"),
        ({"0.q.mask": raw(b"\x78\xbb\0\0\0\1" + b"\0" * 9)}, "cannot be unpacked"),
    ],
)
def test_hostile_tensors_are_refused(path: Path, change: dict[str, Tensor | None], match: str) -> None:
    tensors = {name: tensor for name, tensor in (small_tensors() | change).items() if tensor is not None}
    write(path, seal(small_header(), tensors), tensors)
    with pytest.raises(AdapterError, match=match):
        load(path)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64", "I64", "BOOL"])
def test_rare_dtypes_are_refused(path: Path, dtype: str) -> None:
    tensors = small_tensors()
    tensors["0.q.values"] = torch.zeros(48, dtype=torch.uint8)  # bytes of a whole number of elements of each
    data = safetensors.torch.save(tensors, metadata={"lori": seal(small_header(), tensors)})
    (length,) = struct.unpack_from("<Q", data)
    outer = json.loads(data[8 : 8 + length])
    size = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "C64": 64, "I64": 64, "BOOL": 8}[dtype]
    outer["0.q.values"] |= {"dtype": dtype, "shape": [48 * 8 // size]}
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(AdapterError):
        load(path)


def peak_of_load(path: Path, match: str) -> int:
    """Bytes that Python and NumPy held at most."""
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match=match):
            load(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_mask_that_unfolds_to_much_takes_little_memory(path: Path) -> None:
    num_entries = 2**26
    about = small_header()
    about["modules"]["q"] |= {"shape": [num_entries // 2, 4], "kept": [4]}
    tensors = small_tensors() | {"0.q.mask": raw(zlib.compress(bytes(num_entries // 8), 9))}
    write(path, seal(about, tensors), tensors)
    assert tensors["0.q.mask"].numel() < 10_000
    assert peak_of_load(path, "has 4 values, its mask keeps 0") < 2**21


def test_a_mask_that_goes_on_after_its_end_is_left_there(path: Path) -> None:
    tensors = small_tensors() | {"0.q.mask": raw(zlib.compress(bytes(2**26), 9))}
    write(path, seal(small_header(), tensors), tensors)
    assert peak_of_load(path, "is longer than its 10 entries") < 2**21


def test_counts_are_not_believed(path: Path) -> None:
    about = small_header()
    about["modules"]["q"] |= {"shape": [2**30 - 1, 4], "kept": [2**31 - 2]}
    tensors = {"0.q.values": torch.ones(4)}
    write(path, seal(about, tensors), tensors)
    assert peak_of_load(path, "has 4 values, its header says 2147483646") < 2**21
    about["modules"]["q"]["kept"] = [2**31 - 3]
    tensors = small_tensors()
    write(path, seal(about, tensors), tensors)
    assert peak_of_load(path, "has 4 values, its header says 2147483645") < 2**21
