"""The figures of `lori plan` beside measured ones: memory by kind, traffic, files and the peak of a step."""

import ctypes
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lori_dist import config, plugin
from lori_dist.adapter.attach import adapted, attach, extract
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._traffic import Traffic, local_bytes, moment_bytes, process_bytes
from lori_dist.evaluation import evaluate_all
from lori_dist.evaluation._rehearsal import stand_in
from lori_dist.formats import native
from lori_dist.masks.random import mask
from lori_dist.plan import Hardware, evaluation, file_bytes
from lori_dist.plan.evaluation import components_of
from lori_dist.plan.model import Counted, count, spec
from lori_dist.plan.placement import Placement, memory, placements, traffic
from lori_dist.training import checkpoint, device
from lori_dist.training.data import Batch
from lori_dist.training.engine import gather, trained
from lori_dist.training.trainer import checkpoint_activations
from lori_dist.training.weights import base_parameters, skeleton
from lori_dist.training.world import World

SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
LLAMA = {**SIZES, "intermediate_size": 704, "num_key_value_heads": 2, "max_position_embeddings": 512}
MIXTURES: Mapping[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 32},
    "deepseek_v3": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        **{"first_k_dense_replace": 2, "moe_intermediate_size": 256, "num_key_value_heads": 8, "q_lora_rank": 96},
        **{"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    },
}
"""Mixtures of experts, with dense first layers and shared experts where a kind has them."""
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama, few tokens": ("llama", {**LLAMA, "vocab_size": 256}),
    "llama, tied": ("llama", {**LLAMA, "num_hidden_layers": 4, "hidden_size": 384, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 32}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 32}),
    "gpt2": ("gpt2", {"vocab_size": 4096, "n_positions": 512, "n_embd": 256, "n_layer": 6, "n_head": 8}),
    **{kind: (kind, {**LLAMA, **more}) for kind, more in MIXTURES.items()},
}
"""Name -> type, and settings of its configuration."""
MOST_RANKS = 8
"""Ranks up to which each has a full batch of rows to evaluate."""
TRIM_THRESHOLD = -1
"""A parameter's number, see mallopt(3)."""
SMALLEST = 1 << 14
"""Bytes of memory that is returned to the system as soon as it is free: models here are small."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of every rank."""

    run: config.Run
    place: Path
    engine: str
    options: dict[str, Any] = field(default_factory=dict)


def run(
    *,
    models: list[str] = [],  # noqa: B006  # read from the source, never shared
    engines: list[str] = [],  # noqa: B006
    ranks: list[int] = [2, 4],  # noqa: B006
    density: float = 0.1,
    rank: int = 16,
    rows: int = 8,
    length: int = 128,
) -> dict[str, Any]:
    """Rows for a table, and ratios[kind]: the lowest and the highest of planned over measured.

    models: by default all kinds, of five to twelve million weights. engines: names of placements, such as `fsdp`;
    all by default, hybrids as if there were two nodes. rows, length: of a rank's batch.

    Kinds: of a rank `base`, `adapter` (A, positions, values and what DeepSpeed keeps of them twice) and `moments`,
    between steps; `gathered` and `reduced` in the collectives of a step, each the whole tensor, and `gathered_2`,
    `reduced_2` in those of a step of two micro-batches; `file`, `checkpoint`; `peak`: what there is between steps and
    what the process grows by in one, and `peak_checkpointed`, with activation checkpointing; and `evaluated`, what
    another process grows by while it evaluates the base and an adapter, by losses and by exact match.
    """
    rows_of_table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in models or MODELS:
            base = _make_base(Path(folder) / name.replace(" ", "-"), name)
            described = _described(base, density, rank, rows, length)
            counted = count(described)
            for number in ranks:
                for placement in placements(number, 2):
                    if engines and placement.name not in engines:
                        continue
                    measured = _measured(described, placement, Path(folder), _of_rank)
                    measured |= _measured(described, placement, Path(folder), _of_evaluation)
                    planned = _planned(counted, placement) | {
                        "evaluated": _planned_evaluation(described, counted, placement)
                    }
                    row = {"model": name, "ranks": number, "placement": placement.name}
                    rows_of_table.append(
                        {**row, **{kind: _ratio(planned[kind], size) for kind, size in measured.items()}}
                    )
    kinds = [key for key in rows_of_table[0] if key not in ("model", "ranks", "placement")]
    found = {kind: [row[kind] for row in rows_of_table] for kind in kinds}
    return {"rows": rows_of_table, "ratios": {kind: [min(values), max(values)] for kind, values in found.items()}}


def _ratio(planned: int, measured: int) -> float:
    return 1.0 if planned == measured else round(planned / max(1, measured), 3)


WRITTEN = 8
"""Tokens of a response, and that an evaluation writes."""
WORDS = 200


def _described(base: Path, density: float, rank: int, rows: int, length: int) -> config.Run:
    """A run whose test rows all have `length` tokens."""
    file = base / "rows.jsonl"
    with file.open("w") as stream:
        for number in range(MOST_RANKS * rows):
            words = [f"w{(number + 7 * place) % WORDS}" for place in range(length - 1)]  # and the token that ends it
            row = {"prompt": " ".join(words[:-WRITTEN]) + " ", "response": " ".join(words[-WRITTEN:])}
            stream.write(json.dumps(row) + "\n")
    task = {"train": str(file), "test": str(file)}
    return config.validate(
        {
            "name": "plan",
            "model": {"path": str(base)},
            "tasks": {"one": task},
            "adapter": {"rank": rank, "density": density},
            "train": {"steps": 4, "batch_size": rows, "micro_batch_size": rows, "max_length": length},
            "evaluate": {"metrics": ["loss", "exact_match"], "batch_size": rows, "max_new_tokens": WRITTEN},
        }
    )


def _make_base(folder: Path, name: str) -> Path:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, **{f"w{number}": number + 2 for number in range(WORDS)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<s>").save_pretrained(folder)
    return folder


def _planned(counted: Counted, placement: Placement) -> dict[str, int]:
    kept = counted.kept
    held, saving = (memory(counted, placement, kept=kept, checkpointing=is_saving) for is_saving in (False, True))
    one, two = (_sent(counted, placement, number) for number in (1, 2))
    return {
        "base": held["base"],
        "adapter": held["projections"] + held["positions"] + held["values"],
        "moments": held["moments"],
        "gathered": one.gathered,
        "reduced": one.reduced,
        "gathered_2": two.gathered,
        "reduced_2": two.reduced,
        "file": file_bytes(counted),
        "checkpoint": 3 * 4 * kept,
        "peak": sum(held.values()),
        "peak_checkpointed": sum(saving.values()),
    }


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """Bytes of a step."""

    gathered: int
    reduced: int


def _sent(counted: Counted, placement: Placement, micro_batches: int) -> _Sent:
    sends = traffic(counted, placement, kept=counted.kept, micro_batches=micro_batches, nodes=1)
    gathered = sum(one.bytes for one in sends if one.kind == "gather")
    return _Sent(gathered=gathered, reduced=sum(one.bytes for one in sends) - gathered)


def _planned_evaluation(described: config.Run, counted: Counted, placement: Placement) -> int:
    method = plugin.find("engines", placement.engine, "place", "engine")
    placed = dataclasses.replace(
        placement, options={key: value for key, value in placement.options.items() if key in method.options}
    )
    machine = Hardware(
        gpus=placement.ranks, nodes=1, gpu_memory=0.0, tflops=1.0, link=1.0, network=1.0, fragmentation=0.0
    )
    rows, length = described.evaluate.batch_size, described.train.max_length
    sizes = {"longest": length, "answer": WRITTEN + 1, "rows": rows}
    return sum(evaluation.most_memory(described, counted, placed, machine, **sizes).values())


# --- ranks -----------------------------------------------------------------------------------------------------------


def _measured(
    described: config.Run, placement: Placement, folder: Path, of_rank: Callable[[World, Setting], dict[str, int]]
) -> dict[str, int]:
    place = folder / f"gang-{time.monotonic_ns()}"
    place.mkdir()
    setting = Setting(run=described, place=place, engine=placement.engine, options=dict(placement.options))
    return gang(of_rank, placement.ranks, setting)


def _of_rank(world: World, setting: Setting) -> dict[str, int]:
    _keep_no_freed_memory()
    described = setting.run
    rows, length = described.train.rows_at_once, described.train.max_length
    ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(world.rank))
    is_row = torch.ones_like(ids)
    is_row[0, -1] = 0  # as in most batches, where rows have different lengths
    batch = Batch(input_ids=ids, attention_mask=is_row, labels=ids)
    model, weights = skeleton(described.model)
    of_spec = spec(described)
    shapes = {path: (features(base)[0], of_spec.rank) for path, base in match(model, of_spec.targets).items()}
    zeros = {path: torch.zeros(shape) for path, shape in shapes.items()}
    attach(model, of_spec, masks=mask(zeros, density=described.adapter.density))
    build = plugin.find("engines", setting.engine, "build", "engine").load()
    engine = build(model, weights, described.train, world, state=None, **setting.options)
    targets = world.size * batch.labels[:, 1:].numel()

    def step(micro_batches: int = 1) -> None:
        engine.step([batch] * micro_batches, num_targets=micro_batches * targets, lr=1e-4)

    step()
    grown = _growth(step)
    with Traffic() as sends:
        step()
    with Traffic() as of_two:
        step(2)
    state = checkpoint.save(setting.place / "checkpoints", "train", engine, world, origin={}, keep=1)
    values = gather(engine, "values", world)
    path = setting.place / "adapter.safetensors"
    if world.rank == 0:
        native.save(extract(model, name="one", values=values), path)
    held = {
        "base": sum(map(_held, {id(one): one for one in base_parameters(model).values()}.values())),
        "adapter": sum(map(local_bytes, _of_adapter(model))) + _values(engine, setting),
        "moments": moment_bytes(engine),
    }
    checkpoint_activations(model)
    step()
    step()  # DeepSpeed knows from the second on what is used when
    grown_checkpointed = _growth(step)
    return {
        **held,
        "gathered": sends.gathered,
        "reduced": sends.reduced,
        "gathered_2": of_two.gathered,
        "reduced_2": of_two.reduced,
        "file": path.stat().st_size if world.rank == 0 else 0,
        "checkpoint": state.stat().st_size if world.rank == 0 else 0,
        "peak": sum(held.values()) + grown,
        "peak_checkpointed": sum(held.values()) + grown_checkpointed,
    }


def _of_evaluation(world: World, setting: Setting) -> dict[str, int]:
    """The most bytes that the process grows by while it loads and evaluates the base and an adapter."""
    _keep_no_freed_memory()
    method = plugin.find("engines", setting.engine, "place", "engine")
    options = {key: value for key, value in setting.options.items() if key in method.options}
    tree = config.dump(setting.run)
    tree["evaluate"]["engine"] = {"name": setting.engine, **options}
    described = config.validate(tree)
    made, _ = skeleton(described.model)
    models = {name: stand_in(described, made, 1) if size else None for name, size in components_of(described).items()}

    def evaluate() -> None:
        evaluate_all(described, models, world=world)

    evaluate()  # what libraries take for themselves is not the evaluation's
    return {"evaluated": _growth(evaluate)}


def _of_adapter(model: nn.Module) -> Iterator[Tensor]:
    for layer in adapted(model).values():
        for delta in layer.deltas:
            yield from delta.buffers()


def _values(engine: Any, setting: Setting) -> int:
    """Bytes of the values that compute, and of the copies that DeepSpeed updates beside them."""
    found = sum(map(_held, trained(engine.model.module if setting.engine != "fsdp" else engine.model).values()))
    if setting.engine == "deepspeed":
        zero = engine.model.optimizer
        parts = zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups
        found += sum(map(local_bytes, parts))
    return found


def _held(parameter: Any) -> int:
    """Bytes of a parameter on this rank, hpZ's second copy with them."""
    if not hasattr(parameter, "ds_tensor"):
        return local_bytes(parameter)
    second = getattr(parameter, "ds_secondary_tensor", None)
    return local_bytes(parameter.ds_tensor) + (0 if second is None else local_bytes(second))


def _keep_no_freed_memory() -> None:
    """Returns freed memory to the system at once, so that the process's size is that of its tensors."""
    device.LARGE = SMALLEST  # an engine that places a base would set another threshold
    device.return_freed()
    ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, SMALLEST)


def _growth(step: Callable[[], Any]) -> int:
    """The most bytes this process has in a step above what it has between steps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed would count as there
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    step()
    return process_bytes("VmHWM") - before
