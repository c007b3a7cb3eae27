import json
from pathlib import Path

import pytest

from lori_dist.__main__ import main
from lori_dist.benchmarks.train import COUNTED, ENGINES, run
from lori_dist.errors import ConfigError
from lori_dist.plugin import find

METHODS = ["floor", "peft_lora", "lori_d", "lori_s"]


def test_all_engines_are_measured_by_default() -> None:
    assert find("benchmarks", "train", "run", "SUITE").options["engines"].default == ",".join(ENGINES)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench train: engines: there is no 'zero4'; there are ddp, .*Did you mean"):
        run(engines="ddp,zero4")


@pytest.mark.slow
def test_rows_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    sizes = ["layers=2", "hidden=64", "rows=2", "length=16", "rank=4", "steps=3"]
    assert main(["bench", "train", "engines=fsdp,zero2", *sizes, "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert list(measured["ratios"]) == ["fsdp", "zero2"]
    assert [(row["engine"], row["method"]) for row in measured["rows"]] == [
        (engine, method) for engine in ("fsdp", "zero2") for method in METHODS
    ]
    for engine, ratios in measured["ratios"].items():
        rows = {row["method"]: row for row in measured["rows"] if row["engine"] == engine}
        lora, sparse = rows["peft_lora"], rows["lori_s"]
        kept_share = sparse["trainable"] / lora["trainable"]
        assert set(ratios["lori_s"]) >= {*COUNTED, "step_seconds", "step_seconds_quartiles"}
        # Shards of odd numbers of entries are a little larger than their share.
        assert ratios["lori_s"]["gradient_bytes"] == pytest.approx(kept_share, rel=0.1)
        assert ratios["lori_s"]["optimizer_bytes"] == pytest.approx(kept_share, rel=0.1)
        assert sparse["checkpoint_bytes"] < 12 * sparse["trainable"] + 1500
        assert rows["floor"]["base_gathered_bytes"] == sparse["base_gathered_bytes"]
        assert (sparse["base_gathered_bytes"] > 10_000) == (engine == "fsdp")
        assert 0 < ratios["lori_s"]["saved_activation_bytes"] < 0.5
        assert lora["gradient_bytes"] == pytest.approx(4 * lora["trainable"], rel=0.1)
    assert "fsdp, lori_s, step_seconds" in capsys.readouterr().out
