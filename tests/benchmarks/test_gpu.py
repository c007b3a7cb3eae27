import json
from pathlib import Path

import pytest
import torch

from lori_dist.__main__ import main
from lori_dist.benchmarks.gpu import run
from lori_dist.errors import ConfigError

METHODS = ["peft_lora", "peft_lora_autocast", "lori_s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested is its error where there is no GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench gpu: torch finds no CUDA device here; .* or give device=cpu, which"):
        run()


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench gpu: shape: there is no 'tini'; there are tiny.* Did you mean"):
        run(device="cpu", shape="tini")


def assert_measured(out: Path, *, is_known: bool) -> None:
    measured = json.loads(out.read_text())
    [matmul] = [row for row in measured["rows"] if row["what"] == "matmul"]
    training = {row["method"]: row for row in measured["rows"] if row["what"] == "training"}
    assert list(training) == METHODS
    assert "lori_sparse" in [row["method"] for row in measured["rows"] if row["what"] == "layer"]
    for row in training.values():
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"], rel=0.1)
        assert row["of_matmul"] == pytest.approx(row["tflops"] / matmul["tflops"], rel=0.1)
        assert (row["mfu"] is not None) == (matmul["peak_tflops"] is not None) == is_known
        assert row["last_loss"] < row["first_loss"]
    ours, theirs = training["lori_s"], training["peft_lora"]
    # An update begins at zero, so both have the loss of the base.
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-2)
    assert ours["trainable"] < 0.1 * theirs["trainable"]
    of_times = {f"step_seconds over {name}" for name in METHODS[:2]}
    assert {*of_times, "mfu", "of_matmul", "layer, ms"} <= set(measured["ratios"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_all_of_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "device=cpu", "rank=4", "length=16", "steps=3", "tflops=0.1", "--out", str(out)]) == 0
    assert_measured(out, is_known=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["rank=4", "shape=llama-3-1b", "rows=1", "length=256", "steps=3", "tflops=1000"]
    assert main(["bench", "gpu", *words, "--out", str(out)]) == 0
    assert_measured(out, is_known=True)
