"""A training script as users have them, with LoRI in it. Its one argument is JSON: how it is to train."""

import json
import sys
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lori_dist.integrations.peft_tuner import LoriConfig, dense, sparsify
from lori_dist.masks.magnitude import mask

CONFIG: dict[str, Any] = {"r": 4, "lori_alpha": 8.0, "seed": 1}


def rows(count: int) -> list[dict[str, list[int]]]:
    ids = [[1 + (7 * row + 3 * place * place) % 20 for place in range(8)] for row in range(count)]
    return [{"input_ids": of_row, "labels": of_row} for of_row in ids]


def arguments(how: dict[str, Any]) -> dict[str, Any]:
    always = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "learning_rate": 1e-2}
    return {**always, "output_dir": how["out"], "max_steps": 6, "save_steps": 3, **how.get("args", {})}


def texts() -> Any:
    """Rows for TRL, of different lengths."""
    import datasets

    pairs = [("is a rose red? ", "yes"), ("is a crow white? ", "no")] * 16
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def main(how: dict[str, Any]) -> Trainer:
    """model: a folder. out: where checkpoints and `final` go. dense: a folder with B, for the mask of a sparse phase.
    resume: whether to go on from the last checkpoint. args: of TrainingArguments. trl: whether SFTTrainer trains."""
    stage = how.get("args", {}).get("deepspeed", {}).get("zero_optimization", {}).get("stage")
    if stage == 3:  # else transformers takes the world for one process, on CPU
        from lori_dist.integrations.deepspeed import init_distributed

        init_distributed("gloo")
    args = _sft_config(how) if how.get("trl") else TrainingArguments(**arguments(how))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(how["model"]), LoriConfig(**CONFIG))
    if "dense" in how:
        sparsify(model, mask(dense(how["dense"]), density=0.25))
    tokenizer = AutoTokenizer.from_pretrained(how["model"])
    if how.get("trl"):
        from trl import SFTTrainer

        trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tokenizer)
    else:
        trainer = Trainer(model, args, train_dataset=rows(32), eval_dataset=rows(4), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=how.get("resume", False))
    trainer.save_model(str(Path(how["out"]) / "final"))
    return trainer


def _sft_config(how: dict[str, Any]) -> Any:
    from trl import SFTConfig

    return SFTConfig(**arguments(how), max_length=32, bf16=False)  # its default, whose rounding hides what is compared


def share_of_base(model: Any) -> float:
    """That this rank holds."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in frozen)
    return held / sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in frozen)


if __name__ == "__main__":
    made = main(json.loads(sys.argv[-1]))
    if made.is_world_process_zero():
        print("WRAPPER", type(made.model_wrapped).__name__, f"{share_of_base(made.model):.1f}")
