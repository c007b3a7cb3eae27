"""A run whose evaluation does not fit says so before anything is trained."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lori_dist import config
from lori_dist.cluster.fitting import shortfall
from lori_dist.cluster.run import execute
from lori_dist.errors import ConfigError
from lori_dist.gpus import GIB
from tests.cluster.trained import described
from tests.tokenizers import tiny_tokenizer


def large(folder: Path, gib: int) -> config.Run:
    """A run whose base has so many GiB in a file without content, which takes no room on the disk."""
    run = described(folder, workers=2, cpus_per_worker=0.5)
    hidden = 4096
    settings = LlamaConfig(
        vocab_size=gib * GIB // (2 * 4 * hidden), hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=1,
    )  # fmt: skip
    place = folder / "large"
    settings.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    header, end = {}, 0
    for name, one in made.state_dict().items():
        size = 4 * one.numel()
        header[name] = {"dtype": "F32", "shape": list(one.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, path=str(place)))


def with_engine(run: config.Run, name: str, batch_size: int = 2) -> config.Run:
    evaluate = dataclasses.replace(run.evaluate, engine=config.Choice(name=name), batch_size=batch_size)
    return dataclasses.replace(run, evaluate=evaluate)


def test_a_base_that_fits_no_rank_is_refused_and_large_batches_are_warned_of(tmp_path: Path) -> None:
    run = large(tmp_path, 20)
    with pytest.raises(
        ConfigError, match=r"evaluate.engine: the evaluation on 2 ranks with ddp takes 20.\d GiB a rank"
    ):
        shortfall(with_engine(run, "ddp"), 2, 15 * GIB)
    assert shortfall(with_engine(run, "ddp"), 2, 40 * GIB) is None
    said = shortfall(with_engine(run, "ddp", batch_size=4096), 2, 40 * GIB)
    assert said is not None
    assert "GiB a rank with evaluate.batch_size 4096 and rows of " in said
    assert "lower evaluate.batch_size" in said
    with pytest.raises(ConfigError, match=r"set evaluate.engine to deepspeed \(stage=3"):
        shortfall(with_engine(run, "ddp"), 8, 15 * GIB)
    assert shortfall(with_engine(run, "deepspeed"), 2, 40 * GIB) is None


@pytest.mark.ray
def test_a_run_says_so_before_anything_is_trained(tmp_path: Path) -> None:
    run = large(tmp_path, 2000)
    with pytest.raises(ConfigError, match=r"evaluate.engine: the evaluation on 2 ranks with ddp takes 2000"):
        execute(with_engine(run, "ddp"))
    assert not list(run.folder.glob("*train-copy*"))
