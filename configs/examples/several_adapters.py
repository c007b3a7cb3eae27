"""Several LoRI adapters trained together over one FSDP2 model, each on rows of its own, both phases.

torchrun --nproc-per-node 2 configs/examples/several_adapters.py MODEL OUT MATH.jsonl CODE.jsonl
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

from lori_dist import Spec, attach_several, dense, extract, save_adapter, sparsify, trainable
from lori_dist.masks.magnitude import mask

BATCH, STEPS, LR, CLIP = 8, 6, 5e-3, 1.0


def batches(files: dict[str, str], tokenizer, device: torch.device) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """This rank's rows of each global batch, BATCH of each task: tasks, ids, and each token's weight in the loss."""
    rows = {task: [json.loads(line) for line in Path(path).read_text().splitlines()] for task, path in files.items()}
    for start in range(0, BATCH * STEPS, BATCH):
        encoded = []
        for task, of_task in rows.items():
            pairs = [(row["prompt"] + "\n", row["response"]) for row in of_task[start : start + BATCH]]
            texts = [(tokenizer(p)["input_ids"], tokenizer(r, add_special_tokens=False)["input_ids"]) for p, r in pairs]
            targets = sum(len(response) for _, response in texts)  # of all ranks: a task's loss is its own mean
            encoded += [(task, prompt, response, 1 / targets) for prompt, response in texts]
        mine = encoded[dist.get_rank() :: dist.get_world_size()]
        longest = max(len(prompt) + len(response) for _, prompt, response, _ in mine)
        ids, weights = torch.zeros(len(mine), longest, dtype=torch.int64), torch.zeros(len(mine), longest)
        for place, (_, prompt, response, weight) in enumerate(mine):
            ids[place, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            weights[place, len(prompt) : len(prompt) + len(response)] = weight
        yield [task for task, *_ in mine], ids.to(device), weights.to(device)


def train(model: nn.Module, routing, files: dict[str, str], tokenizer, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=1e-6, weight_decay=0.0)
    for tasks, ids, weights in batches(files, tokenizer, device):
        with routing.rows(tasks):  # row i meets the adapter tasks[i], backward pass included
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            ((losses * weights[:, 1:].flatten()).sum() * dist.get_world_size()).backward()  # FSDP takes the mean
        for task in files:
            torch.nn.utils.clip_grad_norm_(trainable(model, task).values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def main(model_path: str, out: str, *paths: str) -> None:
    files = {Path(path).name.partition(".")[0]: path for path in paths}
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    specs = {task: Spec(rank=8, alpha=16.0, seed=number) for number, task in enumerate(files, start=1)}
    routing = attach_several(model, specs)  # before fully_shard works too
    train(model, routing, files, tokenizer, device)  # LoRI-D
    sparsify(model, {task: mask(dense(model, task), density=0.1) for task in files})
    train(model, routing, files, tokenizer, device)  # LoRI-S
    for task in files:
        adapter = extract(model, name=task)  # a collective
        if dist.get_rank() == 0:
            save_adapter(adapter, Path(out) / f"{task}.safetensors")


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main(*sys.argv[1:])
    dist.destroy_process_group()
