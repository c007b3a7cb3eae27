"""Models in one pass over a sharded base beside one after another, prompts that labels share, and generation."""

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lori_dist import config
from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.adapter.projection import checksum, projection
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._methods import TARGETS
from lori_dist.benchmarks._timing import interleaved, quotients
from lori_dist.evaluation._answers import BASE, Reader
from lori_dist.evaluation._batches import by_length, left_padded, without_settings
from lori_dist.evaluation._passes import attached, passes_of
from lori_dist.evaluation._place import place
from lori_dist.evaluation._rows import Continuation, Likelihood
from lori_dist.training import device
from lori_dist.training.device import put
from lori_dist.training.model import load_tokenizer
from lori_dist.training.tokens import Ids
from lori_dist.training.world import World

KEPT = 10
"""One in so many entries of B is kept."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of every rank."""

    folder: Path
    base: Path
    engine: str
    models: int
    tasks: int
    rank: int
    rows: int
    length: int
    labels: int
    label_tokens: int
    new_tokens: int
    batch_size: int
    repetitions: int
    dtype: str

    @property
    def run(self) -> config.Run:
        rows = str(self.folder / "rows.jsonl")
        return config.validate(
            {
                "name": "bench",
                "model": {"path": str(self.base), "dtype": self.dtype},
                "tasks": {"task": {"train": rows, "test": rows}},
                "train": {"steps": 1},
                "evaluate": {"engine": self.engine, "batch_size": self.batch_size},
            }
        )

    def prompts(self, vocabulary: int, task: int) -> list[Ids]:
        """Rows of a task, of `length` tokens on average."""
        generator = torch.Generator().manual_seed(task)
        lengths = torch.randint(self.length // 2, self.length * 3 // 2 + 1, (self.rows,), generator=generator)
        return [_random(int(length), vocabulary, generator) for length in lengths]

    def choices(self, vocabulary: int, task: int) -> list[Likelihood]:
        """Each row with each label."""
        generator = torch.Generator().manual_seed(1000 + task)
        labels = [_random(self.label_tokens, vocabulary, generator) for _ in range(self.labels)]
        return [Likelihood(prompt, label) for prompt in self.prompts(vocabulary, task) for label in labels]

    def continuations(self, vocabulary: int, task: int) -> list[Continuation]:
        return [Continuation(prompt, self.new_tokens) for prompt in self.prompts(vocabulary, task)]


def run(
    *,
    base: str = "",
    engine: str = "fsdp",
    ranks: int = 2,
    models: int = 6,
    tasks: int = 3,
    layers: int = 30,
    hidden: int = 576,
    vocabulary: int = 49152,
    rank: int = 16,
    rows: int = 8,
    length: int = 48,
    labels: int = 6,
    label_tokens: int = 3,
    new_tokens: int = 16,
    batch_size: int = 8,
    repetitions: int = 3,
    dtype: str = "",
) -> dict[str, Any]:
    """Rows for a table, and ratios, each a median of quotients of turns, with its quartiles.

    base: folder of a model; without one, a Llama with random weights, which has the shape of SmolLM2-135M at the
    defaults of layers, hidden and vocabulary. engine, ranks: that shard it. models, tasks: a matrix of the base and
    adapters of rank `rank` on tasks of `rows` rows, of `length` tokens on average. Tasks have labels (`labels`, of
    `label_tokens` tokens each) and responses of at most `new_tokens` tokens. batch_size: rows at once.

    together_over_in_turn: rows/s of all models in one pass on the gang over those of one model after another there.
    shared_over_apart: rows/s of `choice` with prompts that are read once, over those with a prompt for each label, in
    one process. written_over_generate: rows/s of exact match over those of `generate` of transformers on batches that
    are sorted by length, of one model in one process with as many threads as all ranks have together.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(base) if base else Path(folder) / "base"
        if not base:
            _make(made, layers, hidden, vocabulary)
        (Path(folder) / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
        setting = Setting(
            folder=Path(folder),
            base=made,
            engine=engine,
            models=models,
            tasks=tasks,
            rank=rank,
            rows=rows,
            length=length,
            labels=labels,
            label_tokens=label_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repetitions=repetitions,
            dtype=dtype or device.dtype_of_base(),
        )
        sharded = gang(_on_gang, device.num_ranks(ranks), setting)
        alone = gang(_in_one_process, 1, setting)
    seconds: dict[str, list[float]] = {**sharded, **alone}
    matrix = models * tasks * rows
    counted = {"together": matrix, "in turn": matrix}
    table = [
        {
            "way": way,
            "seconds": round(statistics.median(times), 3),
            "rows_per_second": round(counted.get(way, tasks * rows) / statistics.median(times), 2),
        }
        for way, times in seconds.items()
    ]
    ratios = {
        **quotients("together_over_in_turn", seconds["in turn"], seconds["together"]),
        **quotients("shared_over_apart", seconds["choice, apart"], seconds["choice, shared"]),
        **quotients("written_over_generate", seconds["generate"], seconds["written"]),
    }
    return {"rows": table, "ratios": ratios}


def _make(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A Llama of SmolLM2's proportions with random weights, and a tokenizer, of which only the special tokens count."""
    heads = max(1, hidden // 64)
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {word: number for number, word in enumerate([*special.values(), "a", "b"])}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **special}))


def _random(length: int, vocabulary: int, generator: torch.Generator) -> Ids:
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())


# --- on the gang -----------------------------------------------------------------------------------------------------


def _on_gang(world: World, setting: Setting) -> dict[str, list[float]]:
    """Seconds of all models together and in turn, on the same placed base."""
    base = place(setting.run, world, torch.device("cpu"))
    reader = _reader(setting, base.model, world, is_sharded=base.is_sharded)
    adapters = {f"adapter-{seed}": _adapter(base.model, seed, setting.rank) for seed in range(1, setting.models)}
    names = ["base", *adapters]

    def in_turn() -> None:
        for name in names:
            _measure(reader, setting, {name: adapters[name]} if name in adapters else {}, [name])

    try:
        return interleaved(
            {"together": lambda: _measure(reader, setting, adapters, names), "in turn": in_turn}, setting.repetitions
        )
    finally:
        base.close()


def _measure(reader: Reader, setting: Setting, adapters: Mapping[str, Adapter], names: Sequence[str]) -> None:
    """What loss, choice and exact match ask, of every task."""
    vocabulary, tasks = _vocabulary(reader.model), range(setting.tasks)
    for one in passes_of(reader.model, adapters, names):
        with attached(reader, one) as routed:
            models = list(routed.values())
            for task in tasks:
                reader.answers(models, setting.choices(vocabulary, task)[:: setting.labels])
                reader.answers(models, setting.choices(vocabulary, task))
            for _ in reader.written([(models, setting.continuations(vocabulary, task)) for task in tasks]):
                pass


def _adapter(model: PreTrainedModel, seed: int, rank: int) -> Adapter:
    shapes = {path: features(module) for path, module in match(model, TARGETS).items()}
    index = {path: torch.arange(0, out * rank, KEPT, dtype=torch.int32) for path, (out, _) in shapes.items()}
    block = Block(
        name=f"task-{seed}",
        seed=seed,
        rank=rank,
        alpha=2.0 * rank,
        entries={path: Entries(index=kept, values=torch.full(kept.shape, 0.01)) for path, kept in index.items()},
        checksums={path: checksum(projection(seed, path, rank, width)) for path, (_, width) in shapes.items()},
    )
    return Adapter(shapes=shapes, blocks=(block,), targets=TARGETS)


# --- in one process --------------------------------------------------------------------------------------------------


def _in_one_process(world: World, setting: Setting) -> dict[str, list[float]]:
    """Seconds of the base's choices and of what it writes, each in two ways."""
    model = place(setting.run, None, world.device).model
    vocabulary, tasks = _vocabulary(model), range(setting.tasks)
    # One token in `new_tokens` ends a row, so that rows have different lengths.
    model.generation_config.eos_token_id = list(range(2, vocabulary, setting.new_tokens))
    reader = _reader(setting, model, None, is_sharded=False)
    choices = [request for task in tasks for request in setting.choices(vocabulary, task)]
    asked = [request for task in tasks for request in setting.continuations(vocabulary, task)]

    def write() -> None:
        for _ in reader.written([(BASE, asked)]):
            pass

    candidates: dict[str, Callable[[], object]] = {
        "choice, shared": lambda: reader.answers(BASE, choices),
        "choice, apart": lambda: reader.apart(BASE, choices),
        "written": write,
        "generate": lambda: _generate(reader, asked),
    }
    return interleaved(candidates, setting.repetitions)


@torch.no_grad()
def _generate(reader: Reader, asked: Sequence[Continuation]) -> None:
    """As users of transformers do: batches that are sorted by length, each until all of its rows have ended."""
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=reader.ends,
        pad_token_id=reader.pad,
        max_new_tokens=max(request.max_new_tokens for request in asked),
    )
    for numbers in by_length([request.num_tokens for request in asked], reader.batch_size):
        ids, mask = left_padded([asked[number].prompt_ids for number in numbers], reader.pad)
        with without_settings(reader.model):
            reader.model.generate(
                input_ids=put(ids, reader.device),
                attention_mask=put(mask, reader.device),
                generation_config=settings,
            )


def _reader(setting: Setting, model: PreTrainedModel, world: World | None, *, is_sharded: bool) -> Reader:
    return Reader(
        model=model,
        tokenizer=load_tokenizer(setting.run.model),
        batch_size=setting.batch_size,
        device=model.device if world is None else world.device,
        world=world,
        is_sharded=is_sharded,
    )


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
