"""LoRI with transformers.Trainer, both phases, under any launcher, plain or with DeepSpeed.

torchrun --nproc-per-node 2 configs/examples/trainer.py MODEL ROWS.jsonl OUT.safetensors
deepspeed --num_gpus 2 configs/examples/trainer.py MODEL ROWS.jsonl OUT.safetensors DS_CONFIG.json
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lori_dist import Spec, attach, dense, extract, save_adapter, sparsify
from lori_dist.integrations.deepspeed import init_distributed
from lori_dist.masks.magnitude import mask

BATCH, STEPS, LR, CLIP = 8, 6, 5e-3, 1.0


def encoded(path: str, tokenizer) -> list[dict[str, list[int]]]:
    rows = []
    for row in map(json.loads, Path(path).read_text().splitlines()[: BATCH * STEPS]):
        prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return rows


def collated(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pads = {"input_ids": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [pad] * (longest - len(row[key])) for row in rows]) for key, pad in pads.items()
    }


def train(model: nn.Module, rows: list[dict[str, list[int]]], **arguments) -> Trainer:
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        max_grad_norm=CLIP,
        save_strategy="no",  # a checkpoint would hold the base; the PEFT way of sft_trainer.py leaves it out
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **arguments,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collated)
    trainer.train()
    return trainer


def main(model_path: str, rows: str, out: str, deepspeed: str | None = None) -> None:
    if deepspeed is not None:
        init_distributed(None if torch.cuda.is_available() else "gloo")  # before TrainingArguments
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    attach(model, Spec(rank=8, alpha=16.0, seed=1))  # before the Trainer is made
    trainer = train(model, encoded(rows, tokenizer), deepspeed=deepspeed)  # LoRI-D: B is dense
    b = dense(model)  # a collective; every rank has all of it
    trainer.accelerator.free_memory()  # ends DeepSpeed's engine, if there is one
    sparsify(model, mask(b, density=0.1))  # in place
    train(model, encoded(rows, tokenizer), deepspeed=deepspeed)  # LoRI-S: a tenth of B, from zero, on the same A
    adapter = extract(model, name="mine")  # a collective; every rank has all of it
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_adapter(adapter, Path(out))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
