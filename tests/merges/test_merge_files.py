"""Merging from file to file."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lori_dist.errors import AdapterError, ConfigError
from lori_dist.formats import native
from lori_dist.merges import merge_files
from tests.merges.made import SHAPES, adapter, block, delta


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Three adapters on one A: ranks, and so ranks of the linear merge, are 2."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("nlu", "math", "code")]
    for number, path in enumerate(paths):
        part = block(path.stem, draw=number, values_dtype=torch.float32)
        native.save(adapter(part, base={"weights": "abc"}), path)
    return paths


@pytest.mark.parametrize(("method", "rank"), [("concat", 6), ("linear", 2)])
def test_the_merge_is_in_the_file_and_described(paths: list[Path], tmp_path: Path, method: str, rank: int) -> None:
    out = tmp_path / "merged.safetensors"
    made = merge_files(paths, out, method=method, weights=[0.5, -1, 2])
    merged = native.load(out)
    assert made == {
        "path": str(out),
        "kept": merged.kept,
        "total": sum(out_features for out_features, _ in SHAPES.values()) * rank,
        "bytes": out.stat().st_size,
        "rank": rank,
    }
    parts = [native.load(path) for path in paths]
    for module in SHAPES:
        wanted = sum(weight * delta(part, module) for weight, part in zip([0.5, -1, 2], parts, strict=True))
        assert torch.allclose(delta(merged, module), wanted, rtol=0, atol=1e-5)


def test_weights_are_equal_and_sum_to_one_by_default(paths: list[Path], tmp_path: Path) -> None:
    merge_files(paths, tmp_path / "merged.safetensors", method="concat")
    assert [part.weight for part in native.load(tmp_path / "merged.safetensors").blocks] == [1 / 3] * 3


def test_adapters_of_other_modules_merge_into_a_file_that_loads(paths: list[Path], tmp_path: Path) -> None:
    few = ["layers.0.q_proj"]
    other = tmp_path / "other.safetensors"
    native.save(adapter(block("other", seed=9, modules=few), modules=few, targets=("q_proj",)), other)
    for method in ("concat", "linear"):
        out = tmp_path / f"{method}.safetensors"
        merge_files([other, paths[0]], out, method=method)
        merged = native.load(out)
        assert set(merged.shapes) == set(SHAPES)
        assert "layers.1.q_proj" not in merged.blocks[0].entries


def test_mistakes_are_named_and_leave_no_file(paths: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    with pytest.raises(ConfigError, match=r"merge\.method: unknown 'linaer' .* Did you mean 'linear'\?"):
        merge_files(paths, out, method="linaer")
    with pytest.raises(ConfigError, match=r"merge\.method\.density: linear has no such option; it takes none"):
        merge_files(paths, out, method="linear", options={"density": 0.5})
    with pytest.raises(ConfigError, match=r"merge\.weights: 2 given for 3 adapters \(nlu, math, code\)"):
        merge_files(paths, out, method="concat", weights=[1, 2])
    with pytest.raises(AdapterError, match="got no adapters"):
        merge_files([], out, method="concat")
    with pytest.raises(AdapterError, match=r"none\.safetensors: it cannot be read"):
        merge_files([tmp_path / "none.safetensors"], out, method="concat")
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(AdapterError, match=r"math\.safetensors: "):
        merge_files(paths, out, method="concat")
    odd = tmp_path / "odd.safetensors"
    native.save(dataclasses.replace(adapter(block("odd")), base={"weights": "other"}), odd)
    with pytest.raises(
        AdapterError, match="merge: nlu was trained on a base model with weights abc, odd on one with other"
    ):
        merge_files([paths[0], odd], out, method="linear")
    assert not out.exists()


def test_a_merge_of_the_users_own_takes_its_options(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mymerges").mkdir()
    (tmp_path / "mymerges" / "scaled.py").write_text(
        "from lori_dist.merges import concat\n"
        "def merge(updates, *, weights, factor: float = 1.0):\n"
        "    return concat.merge(updates, weights=[factor * weight for weight in weights])\n"
    )
    out = tmp_path / "merged.safetensors"
    merge_files(paths, out, method="mymerges.scaled", options={"factor": 3}, weights=[1, 1, 1])
    assert [part.weight for part in native.load(out).blocks] == [3.0] * 3


def test_merges_need_nothing_heavy() -> None:
    program = """
import sys
import lori_dist.merges.concat, lori_dist.merges.linear
print(sorted({"transformers", "ray", "deepspeed", "accelerate", "yaml"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
