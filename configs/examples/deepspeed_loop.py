"""LoRI in a training loop of one's own with DeepSpeed ZeRO, both phases, at any stage (here 3).

deepspeed --num_gpus 2 configs/examples/deepspeed_loop.py MODEL ROWS.jsonl OUT.safetensors
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_dist import Spec, attach, dense, extract, save_adapter, sparsify, trainable
from lori_dist.masks.magnitude import mask

BATCH, STEPS = 8, 6
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "eps": 1e-6, "weight_decay": 0.0, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def batches(path: str, tokenizer, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This rank's rows of each global batch: ids, labels (-100 where nothing is learned), targets of all ranks."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for start in range(0, BATCH * STEPS, BATCH):
        encoded = []
        for row in rows[start : start + BATCH]:
            prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
            encoded.append((prompt, tokenizer(row["response"], add_special_tokens=False)["input_ids"]))
        targets = sum(len(response) for _, response in encoded)
        mine = encoded[dist.get_rank() :: dist.get_world_size()]
        longest = max(len(prompt) + len(response) for prompt, response in mine)
        ids, labels = (torch.full((len(mine), longest), pad) for pad in (0, -100))
        for place, (prompt, response) in enumerate(mine):
            ids[place, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[place, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        yield ids.to(device), labels.to(device), targets


def train(model: nn.Module, path: str, tokenizer, device: torch.device) -> deepspeed.DeepSpeedEngine:
    parameters = [*trainable(model).values()]  # the adapter alone
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=dict(CONFIG))
    for ids, labels, targets in batches(path, tokenizer, device):
        logits = engine(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        engine.backward(loss / targets * dist.get_world_size())  # DeepSpeed takes the mean over ranks
        engine.step()
    return engine


def main(model_path: str, rows: str, out: str) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device)
    attach(model, Spec(rank=8, alpha=16.0, seed=1))  # before deepspeed.initialize, and not inside deepspeed.zero.Init
    engine = train(model, rows, tokenizer, device)  # LoRI-D: B is dense
    b = dense(model)  # a collective; every rank has all of it
    engine.destroy()
    sparsify(model, mask(b, density=0.1))  # the base stays partitioned where it is
    train(model, rows, tokenizer, device)  # LoRI-S: a tenth of B, from zero, on the same A
    adapter = extract(model, name="mine")  # a collective; every rank has all of it
    if dist.get_rank() == 0:
        save_adapter(adapter, Path(out))


if __name__ == "__main__":
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    dist.destroy_process_group()
