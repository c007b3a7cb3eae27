"""transformers.Trainer and TRL's SFTTrainer as they are: checkpoints hold the adapter, and resuming is exact."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lori_dist import formats
from lori_dist.integrations.peft_tuner import LoriConfig, LoriLinear
from tests.integrations.trainer_script import CONFIG, arguments, main
from tests.launching import ROOT, free_port, run_all
from tests.models import tiny_llama
from tests.tokenizers import save

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5.23 for it
    "ignore:'pin_memory' argument is set as true but:UserWarning",
    "ignore:Was asked to gather along dimension 0:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",  # TRL sets it
)
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def dense_folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first phase has left."""
    out = tmp_path_factory.mktemp("dense")
    main({"model": str(model), "out": str(out)})
    return out / "final"


def values(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found: Path, wanted: Path, tolerance: float = 0.0) -> None:
    ours, theirs = values(found), values(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).float().norm()) <= tolerance * float(tensor.float().norm()), name


def assert_no_base(checkpoint: Path) -> None:
    """No tensor in it has the size of a weight of the base, or of an A."""
    held = values(checkpoint)
    assert held and all(name.endswith((".values", ".index")) for name in held)
    entries = sum(tensor.numel() for name, tensor in held.items() if name.endswith(".values"))
    base = sum(parameter.numel() for parameter in tiny_llama().parameters())
    for file in [*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.bin")]:
        assert tensors_in(torch.load(file, weights_only=False)) < min(base / 4, 3 * entries + 10_000), file
    assert not list(checkpoint.rglob("model*.safetensors"))


def tensors_in(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.numel() if tree.is_floating_point() else 0
    if isinstance(tree, dict):
        return sum(map(tensors_in, tree.values()))
    return sum(map(tensors_in, tree)) if isinstance(tree, list | tuple) else 0


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_checkpoints_hold_the_adapter_and_resuming_is_exact(
    model: Path, dense_folder: Path, is_sparse: bool, tmp_path: Path
) -> None:
    how = {"model": str(model), **({"dense": str(dense_folder)} if is_sparse else {})}
    trainer = main({**how, "out": str(tmp_path / "whole")})
    assert_no_base(tmp_path / "whole" / "checkpoint-3")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    main({**how, "out": str(tmp_path / "resumed"), "resume": True})
    assert_equal(tmp_path / "resumed" / "final", tmp_path / "whole" / "final")
    adapter = formats.load(tmp_path / "whole" / "final")
    assert adapter.blocks[0].seed == CONFIG["seed"]
    assert (adapter.kept < adapter.total) == is_sparse
    for layer in trainer.model.modules():
        if isinstance(layer, LoriLinear):
            torch.testing.assert_close(adapter.delta(layer.path), layer.get_delta_weight("default"))


def test_the_best_model_is_loaded_at_the_end(model: Path, tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    rising = {**often, "learning_rate": 3.0, "max_steps": 4}  # so that the first steps are the best
    trainer = main({"model": str(model), "out": str(tmp_path), "args": rising})
    best = Path(str(trainer.state.best_model_checkpoint))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{1 + losses.index(min(losses))}" != "checkpoint-4"
    assert_equal(tmp_path / "final", best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(model: Path, dense_folder: Path, tmp_path: Path) -> None:
    for name, is_on in (("on", True), ("off", False)):
        args = {"activation_checkpointing": is_on}
        main({"model": str(model), "out": str(tmp_path / name), "dense": str(dense_folder), "args": args})
    assert_equal(tmp_path / "on" / "final", tmp_path / "off" / "final", TOLERANCE)


def test_losses_are_reported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    main({"model": str(model), "out": str(tmp_path), "args": {"report_to": "tensorboard"}})
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))


def zero(stage: int) -> dict[str, Any]:
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **dict.fromkeys(sizes, "auto")}}


BIN = Path(sys.executable).parent
LAUNCHES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "zero3": (["deepspeed", "--num_gpus", "2", "--master_port", "PORT"], zero(3), "DeepSpeedEngine"),
    "zero2": (["deepspeed", "--num_gpus", "2", "--master_port", "PORT"], zero(2), "DeepSpeedEngine"),
    "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "2"], {}, "DistributedDataParallel"),
    "accelerate": (
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"],
        {},
        "DistributedDataParallel",
    ),
}


@pytest.mark.slow  # without launchers and shorter, in tests/test_examples.py
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_two_ranks_train_what_one_does(model: Path, dense_folder: Path, launcher: str, tmp_path: Path) -> None:
    """From any launcher, and go on as if nothing had been."""
    command, args, wrapper = LAUNCHES[launcher]
    how = {"model": str(model), "dense": str(dense_folder)}
    main({**how, "out": str(tmp_path / "one"), "args": {"per_device_train_batch_size": 4}})
    args = {**args, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    for out, resume in (("two", False), ("resumed", True)):
        if resume:
            shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / out / "checkpoint-3")
        found = launch(command, {**how, "out": str(tmp_path / out), "args": args, "resume": resume})
        assert found == (wrapper, 0.5 if launcher == "zero3" else 1.0)
        assert_no_base(tmp_path / out / "checkpoint-6")
        assert_equal(tmp_path / out / "final", tmp_path / "one" / "final", TOLERANCE)


def launch(command: list[str], how: dict[str, Any]) -> tuple[str, float]:
    """What a launcher's processes have put around the model, and the share of the base that the first holds."""
    words = [word.replace("PORT", free_port()) for word in command]
    script = str(ROOT / "tests" / "integrations" / "trainer_script.py")
    log = Path(how["out"]).with_suffix(".log")
    launched = run_all([[str(BIN / words[0]), *words[1:], script, json.dumps(how)]], ROOT, log)
    assert launched.codes == [0], launched.output
    wrapper, share = launched.output.partition("WRAPPER ")[2].split()[:2]
    return wrapper, float(share)


@pytest.mark.gpu
def test_fsdp_trains_what_one_gpu_does(model: Path, dense_folder: Path, tmp_path: Path) -> None:
    """On as many GPUs as divide a batch. Without any, accelerate leaves fsdp= out and says nothing."""
    num_ranks = max(number for number in (1, 2, 4) if number <= torch.cuda.device_count())
    fsdp = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}
    for out, ranks, args in (("one", 1, {}), ("all", num_ranks, fsdp)):
        args |= {"use_cpu": False, "per_device_train_batch_size": 4 // ranks}
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        how = {"model": str(model), "dense": str(dense_folder), "out": str(tmp_path / out), "args": args}
        assert launch(command, how)[0].startswith("FSDP") == (out == "all")
    # Kernels for batches of another size may add up in another order.
    assert_equal(tmp_path / "all" / "final", tmp_path / "one" / "final", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero3", "torchrun"])
def test_two_ranks_of_sft_trainer_train_what_one_does(
    model: Path, dense_folder: Path, launcher: str, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    command, args, wrapper = LAUNCHES[launcher]
    how = {"model": str(model), "dense": str(dense_folder), "trl": True}
    main({**how, "out": str(tmp_path / "one"), "args": {"per_device_train_batch_size": 4}})
    args = {**args, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    assert launch(command, {**how, "out": str(tmp_path / "two"), "args": args})[0] == wrapper
    assert_no_base(tmp_path / "two" / "checkpoint-6")
    assert_equal(tmp_path / "two" / "final", tmp_path / "one" / "final", TOLERANCE)


@pytest.mark.parametrize("form", ["prompts", "messages"])
def test_sft_trainer_takes_the_config(model: Path, form: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    pairs = [("is a rose red? ", "yes"), ("is a crow white? ", "no")] * 8
    if form == "prompts":
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    else:
        told = [(("user", prompt), ("assistant", completion)) for prompt, completion in pairs]
        rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in told]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    losses = []
    for out, resume in (("whole", False), ("resumed", True)):
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
        given = arguments({"out": str(tmp_path / out), "args": {"max_length": 32}})
        trainer = trl.SFTTrainer(
            str(model),
            args=trl.SFTConfig(**given, model_init_kwargs={"dtype": "float32"}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoriConfig(**CONFIG, target_modules="all-linear"),
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(tmp_path / out / "final"))
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_no_base(tmp_path / "whole" / "checkpoint-3")
    assert_equal(tmp_path / "resumed" / "final", tmp_path / "whole" / "final")
    assert losses[5] < losses[0]
