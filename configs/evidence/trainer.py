"""Time of a step and peak memory of transformers.Trainer, with PEFT's LoRA or with LoriConfig, on the rows of sst2.

torchrun --standalone --nproc-per-node 2 configs/evidence/trainer.py lora evidence/runs/trainer-lora.json
torchrun --standalone --nproc-per-node 2 configs/evidence/trainer.py lori-d evidence/runs/trainer-lori-d.json
torchrun --standalone --nproc-per-node 2 configs/evidence/trainer.py lori-s evidence/runs/trainer-lori-s.json

Rows, batch, rank and layers are those of tasks.yaml, so that the times can stand beside `lori train` in speed.yaml.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from lori_dist import config
from lori_dist.integrations.peft_tuner import LoriConfig, dense, sparsify
from lori_dist.masks.magnitude import mask

STEPS, TASK = 12, "sst2"


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(time.monotonic())


def adapted(method: str, run: config.Run) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)
    rank, alpha = run.adapter.rank, run.adapter.alpha
    if method == "lora":
        return get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model = get_peft_model(model, LoriConfig(r=rank, lori_alpha=alpha, seed=0))
    if method == "lori-s":
        # Chosen at random, as a step takes as long whatever is kept.
        b = {path: torch.rand_like(of_path) for path, of_path in dense(model).items()}
        sparsify(model, mask(b, density=run.adapter.density))
    return model


def encoded(run: config.Run, tokenizer) -> list[dict[str, list[int]]]:
    template, found = run.tasks[TASK].template, []
    for line in Path(run.tasks[TASK].train).read_text().splitlines()[: STEPS * run.train.batch_size]:
        row = json.loads(line)
        prompt = tokenizer(template.prompt.format(**row))["input_ids"]
        response = tokenizer(template.response.format(**row))["input_ids"] + [tokenizer.eos_token_id]
        found.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return found


def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, pad: int) -> torch.Tensor:
        return torch.tensor([row[key] + [pad] * (longest - len(row[key])) for row in rows])

    real = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": real}


def main(method: str, out: str) -> None:
    run = config.load("configs/evidence/tasks.yaml")
    ranks, clock = int(os.environ.get("WORLD_SIZE", "1")), Clock()
    torch.set_num_threads(1)
    rows = encoded(run, AutoTokenizer.from_pretrained(run.model.path))
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=run.train.batch_size // ranks,
        max_steps=STEPS,
        learning_rate=run.train.lr,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(adapted(method, run), arguments, train_dataset=rows, data_collator=collated, callbacks=[clock])
    trainer.train()
    if trainer.is_world_process_zero():
        seconds = [after - before for before, after in itertools.pairwise(clock.ends)]
        found = {
            "run": Path(out).stem,
            "method": method,
            "ranks": ranks,
            "steps": STEPS,
            "rows": run.train.batch_size,
            "step_seconds": statistics.median(seconds),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
