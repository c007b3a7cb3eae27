"""LoRI with TRL's SFTTrainer, both phases, through PEFT, whose checkpoints hold the adapter alone.

torchrun --nproc-per-node 2 configs/examples/sft_trainer.py MODEL ROWS.jsonl OUT.safetensors
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lori_dist import save_adapter
from lori_dist.integrations.peft_tuner import LoriConfig, dense, sparsify, to_adapter
from lori_dist.masks.magnitude import mask

BATCH, STEPS, LR, CLIP = 8, 6, 5e-3, 1.0


def arguments(folder: str) -> SFTConfig:
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        max_grad_norm=CLIP,
        bf16=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def main(model_path: str, rows: str, out: str) -> None:
    read = [json.loads(line) for line in Path(rows).read_text().splitlines()[: BATCH * STEPS]]
    pairs = Dataset.from_list([{"prompt": row["prompt"] + "\n", "completion": row["response"]} for row in read])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = LoriConfig(r=8, lori_alpha=16.0, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        given = {"args": arguments(folder), "train_dataset": pairs, "processing_class": tokenizer}
        first = SFTTrainer(model, peft_config=config, **given)
        first.train()  # LoRI-D: B is dense
        sparsify(first.model, mask(dense(first.model), density=0.1))  # in place
        second = SFTTrainer(first.model, **given)
        second.train()  # LoRI-S: a tenth of B, from zero, on the same A
        adapter = to_adapter(second.model)
        if second.is_world_process_zero():
            save_adapter(adapter, Path(out))
        second.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
