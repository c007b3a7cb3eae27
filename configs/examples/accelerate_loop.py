"""LoRI in a training loop with accelerate, both phases, with DDP, its FSDP2 plugin or its DeepSpeed plugin.

accelerate launch --config_file CONFIG.yaml configs/examples/accelerate_loop.py MODEL ROWS.jsonl OUT.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_dist import Spec, attach, dense, extract, save_adapter, sparsify, trainable
from lori_dist.masks.magnitude import mask

BATCH, STEPS, LR, CLIP = 8, 6, 5e-3, 1.0


def loader_of(path: str, tokenizer, accelerator: Accelerator) -> DataLoader:
    """Ids and labels, which are -100 where nothing is learned."""

    def collated(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        prompts = [tokenizer(row["prompt"] + "\n")["input_ids"] for row in rows]
        responses = [tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in rows]
        longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
        ids, labels = (torch.full((len(rows), longest), pad) for pad in (0, -100))
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids[place, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[place, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        return ids, labels

    rows = [json.loads(line) for line in Path(path).read_text().splitlines()[: BATCH * STEPS]]
    return DataLoader(rows, batch_size=BATCH // accelerator.num_processes, collate_fn=collated)


def train(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> nn.Module:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, eps=1e-6, weight_decay=0.0)  # the adapter alone
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids, labels in loader:
        targets = accelerator.reduce((labels[:, 1:] != -100).sum(), "sum")
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        accelerator.backward(loss / targets * accelerator.num_processes)  # every plugin takes the mean over ranks
        accelerator.clip_grad_norm_(trainable(model).values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(model_path: str, rows: str, out: str) -> None:
    PartialState(cpu=not torch.cuda.is_available())  # without a GPU, accelerate sees one rank otherwise
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    attach(model, Spec(rank=8, alpha=16.0, seed=1))  # before accelerator.prepare
    prepared = train(accelerator, model, loader_of(rows, tokenizer, accelerator))  # LoRI-D: B is dense
    b = dense(prepared)  # a collective; every rank has all of it
    accelerator.free_memory()  # the model is prepared again below, with the parameters that it has then
    model = accelerator.unwrap_model(prepared)
    sparsify(model, mask(b, density=0.1))  # in place; a sharded base stays sharded
    prepared = train(accelerator, model, loader_of(rows, tokenizer, accelerator))  # LoRI-S: from zero, on the same A
    adapter = extract(prepared, name="mine")  # a collective; every rank has all of it
    if accelerator.is_main_process:
        save_adapter(adapter, Path(out))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
