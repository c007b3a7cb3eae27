"""LoRI in a training loop of one's own with FSDP2, both phases.

torchrun --nproc-per-node 2 configs/examples/fsdp2_loop.py MODEL ROWS.jsonl OUT.safetensors
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_dist import Spec, attach, dense, extract, save_adapter, sparsify, trainable
from lori_dist.masks.magnitude import mask

BATCH, STEPS, LR, CLIP = 8, 6, 5e-3, 1.0


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


def train(model: nn.Module, path: str, tokenizer, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=1e-6, weight_decay=0.0)  # the adapter alone
    for ids, labels, targets in batches(path, tokenizer, device):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        (loss / targets * dist.get_world_size()).backward()  # FSDP takes the mean over ranks
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def main(model_path: str, rows: str, out: str) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    attach(model, Spec(rank=8, alpha=16.0, seed=1))  # B is sharded with its block; before fully_shard works too
    train(model, rows, tokenizer, device)  # LoRI-D: B is dense
    sparsify(model, mask(dense(model), density=0.1))  # a collective; the base stays where it is
    train(model, rows, tokenizer, device)  # LoRI-S: a tenth of B, from zero, on the same A
    adapter = extract(model, name="mine")  # a collective; every rank has all of it
    if dist.get_rank() == 0:
        save_adapter(adapter, Path(out))


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main(*sys.argv[1:])
    dist.destroy_process_group()
