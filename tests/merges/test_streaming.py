"""What a merge of files has in memory and on disk on its way, and that it makes the same file as one in memory."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lori_dist import plugin
from lori_dist.adapter.adapter import Adapter, Block
from lori_dist.errors import AdapterError
from lori_dist.formats import native
from lori_dist.merges import merge, merge_files
from tests.merges.made import adapter, block, random_entries

WEIGHTS = [0.5, -1.0, 2.0]


def saved(folder: Path, seeds: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Path]:
    paths = [folder / f"task{place}.safetensors" for place in range(len(seeds))]
    for place, path in enumerate(paths):
        part = block(path.stem, seed=seeds[place], rank=3, draw=place, density=0.4, values_dtype=torch.float32)
        native.save(adapter(part, base={"weights": "abc"}), path, dtype=dtype)
    return paths


@pytest.mark.parametrize("seeds", [(0, 1, 2), (5, 5, 5), (0, 5, 5)])
@pytest.mark.parametrize("method", plugin.names("merges"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_that_of_a_merge_in_memory(
    tmp_path: Path, method: str, seeds: tuple[int, ...], dtype: torch.dtype
) -> None:
    paths = saved(tmp_path, seeds, dtype)
    native.save(
        merge([native.load(path) for path in paths], method=method, weights=WEIGHTS), tmp_path / "wanted.safetensors"
    )
    for num_ranges in (1, 3, 99):
        merge_files(paths, tmp_path / "found.safetensors", method=method, weights=WEIGHTS, num_ranges=num_ranges)
        assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("second", ["concat", "linear", "svd"])
def test_merges_of_merges_that_store_a_are_the_same_as_well(tmp_path: Path, second: str) -> None:
    paths = saved(tmp_path, (0, 1, 2))
    merge_files(paths[:2], tmp_path / "stored.safetensors", method="svd")
    inputs = [tmp_path / "stored.safetensors", paths[2]]
    merge_files(inputs, tmp_path / "found.safetensors", method=second, weights=[1, -1])
    native.save(merge([native.load(path) for path in inputs], method=second, weights=[1, -1]), tmp_path / "wanted")
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_an_opened_adapter_is_the_loaded_one_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    [path] = saved(tmp_path, (0,))
    opened, loaded = native.open_lazy(path), native.load(path)
    for module, entries in loaded.blocks[0].entries.items():
        assert torch.equal(opened.blocks[0].entries[module].values, entries.values)
    assert (opened.kept, opened.total, opened.shapes) == (loaded.kept, loaded.total, loaded.shapes)
    native.save(opened, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", ["concat", "linear", "ties", "svd"])
@pytest.mark.parametrize("what", ["values", "mask"])
def test_damage_in_the_middle_is_named_and_leaves_nothing(tmp_path: Path, method: str, what: str) -> None:
    paths = saved(tmp_path, (5, 5, 5))
    spoil(paths[1], f"0.layers.1.q_proj.{what}")
    message = r"^\S*task1\.safetensors: B of layers\.1\.q_proj in block 0 does not match its digest; the file is dam"
    with pytest.raises(AdapterError, match=message):
        merge_files(paths, tmp_path / "merged.safetensors", method=method)
    assert sorted(tmp_path.iterdir()) == paths


def spoil(path: Path, tensor: str) -> None:
    """One bit of it."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + begin] ^= 1
    path.write_bytes(data)


def test_a_kill_in_the_middle_leaves_no_file_and_what_was_there(tmp_path: Path) -> None:
    paths = saved(tmp_path, (0, 1, 2))
    (tmp_path / "killing.py").write_text(
        "import os, signal\n"
        "from lori_dist.merges import linear\n"
        "def merge(updates, *, weights):\n"
        "    if updates[0].module == 'layers.1.q_proj':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return linear.merge(updates, weights=weights)\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "killing.py").rename(tmp_path / "mine" / "killing.py")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pathlib import Path; "
        "from lori_dist.merges import merge_files; "
        f"merge_files([Path(p) for p in {[str(path) for path in paths]!r}], Path({str(tmp_path / 'merged')!r}), "
        "method='mine.killing')"
    )
    for before in (None, b"precious"):
        if before is not None:
            (tmp_path / "merged").write_bytes(before)
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert (tmp_path / "merged").exists() == (before is not None)
    assert (tmp_path / "merged").read_bytes() == b"precious"


MODULES, SHAPE, RANK = 64, (4096, 64), 32
MODULE_BYTES = 4 * SHAPE[0] * RANK * 8
"""Of all four adapters' B of one module, as methods take it: dense, float64."""

MEASURE = """
import json, sys
from pathlib import Path
from lori_dist.merges import merge_files

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

method, small, large, out = json.loads(sys.argv[1])
merge_files([Path(path) for path in small], Path(out), method=method)  # what a first use loads
before = peak()
merge_files([Path(path) for path in large], Path(out), method=method)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Number of modules -> four adapters with so many."""
    folder = tmp_path_factory.mktemp("many")
    found: dict[int, list[str]] = {}
    for number in (2, MODULES):
        found[number] = [str(folder / f"{number}-{place}.safetensors") for place in range(4)]
        for place, path in enumerate(found[number]):
            native.save(large(number, place), path)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Number of modules -> four LoRA folders of PEFT with so many."""
    place = tmp_path_factory.mktemp("folders")
    found: dict[int, list[str]] = {}
    for number in (2, MODULES):
        found[number] = [str(place / f"{number}-{task}") for task in range(4)]
        for folder in map(Path, found[number]):
            folder.mkdir()
            about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["up_proj"]}
            (folder / "adapter_config.json").write_text(json.dumps(about))
            tensors = {}
            for layer in range(number):
                name = f"base_model.model.layers.{layer}.up_proj"
                tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, SHAPE[1])
                tensors[f"{name}.lora_B.weight"] = torch.randn(SHAPE[0], RANK)
            save_file(tensors, folder / "adapter_model.safetensors")
    return found


def large(number: int, place: int) -> Adapter:
    generator = torch.Generator().manual_seed(place)
    modules = [f"layers.{layer}.up_proj" for layer in range(number)]
    one = Block(
        name=f"task{place}",
        seed=1,
        rank=RANK,
        alpha=8.0,
        entries={module: random_entries(SHAPE[0] * RANK, 0.5, generator, torch.float32) for module in modules},
        checksums=dict.fromkeys(modules, "0" * 16),  # of A, which none of these methods makes
    )
    return Adapter(shapes=dict.fromkeys(modules, SHAPE), blocks=(one,), targets="all-linear")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["concat", "linear", "ties"])
def test_memory_holds_a_few_modules_not_all(many: dict[int, list[str]], tmp_path: Path, method: str) -> None:
    all_values = sum(Path(path).stat().st_size for path in many[MODULES])
    assert all_values > 60e6
    assert grown(many, tmp_path, method) < 5 * MODULE_BYTES < all_values / 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["concat", "svd"])
def test_nor_does_it_of_folders_of_peft(folders: dict[int, list[str]], tmp_path: Path, method: str) -> None:
    all_values = sum((Path(path) / "adapter_model.safetensors").stat().st_size for path in folders[MODULES])
    assert all_values > 130e6
    assert grown(folders, tmp_path, method) < 5 * MODULE_BYTES < all_values / 6


def grown(sources: dict[int, list[str]], folder: Path, method: str) -> int:
    """Bytes by which memory grows in a merge of many modules, over one of two."""
    given = json.dumps([method, sources[2], sources[MODULES], str(folder / "merged.safetensors")])
    done = subprocess.run([sys.executable, "-c", MEASURE, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
