"""Rows on their way into steps: tokens beside `datasets.map`, memory of a rank, waiting for batches and other ranks."""

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lori_dist import config
from lori_dist.benchmarks._gang import gang
from lori_dist.benchmarks._methods import make_llama
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.errors import ConfigError, Preempted
from lori_dist.training import device
from lori_dist.training.data import encode, read
from lori_dist.training.micro_batches import divided, micro_batches
from lori_dist.training.preemption import Notice
from lori_dist.training.train import train
from lori_dist.training.world import World

FEW = 1000
"""Rows of the runs that others are compared with."""
STEPS, STEPS_DIVIDED = 8, 200
"""Steps of a start, and those whose rows are divided."""
WORDS, VOCABULARY = 3000, 4096
PROMPT, RESPONSE = (20, 70), (25, 80)
"""Fewest and most words of a text: a row has about as many bytes as one of GSM8K."""


def run(*, rows: int = 300_000, ranks: int = 2, length: int = 512, files: str = "") -> dict[str, Any]:
    """Rows for a table, one for each start of a training, and ratios.

    rows: of a JSON lines file that is made for this. ranks: processes of a start, and of `datasets.map`. length:
    train.max_length. files: JSON lines files with prompt and response, separated by commas, whose rows are mixed to
    measure how a step is divided; by default those that are made. The base is a Llama of two small layers, the
    tokenizer a byte-level BPE.

    first_step_seconds: from the start of the processes to the end of the first step. peak_memory_bytes: the largest
    size of rank 0's process. In the ratios, tokens_over_map: the additional time of the first start with all rows, over
    that with few, divided by the time of `datasets.map` with as many processes. second_start_seconds and
    memory_bytes: what a start whose tokens are there takes more than one with few rows. data_wait: share of a step that
    rank 0 waits for its batch, the median of those after the first. idle: share of a step in which a rank that
    computes less waits, by the tokens that are computed, padding included, with rows divided by their number and by
    their tokens; computed: tokens that the ranks compute, as a multiple of those of the rows.
    Raises ConfigError where `datasets` is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "bench data: datasets is not installed, and its map is what is measured against; "
            "pip install 'lori_dist[data]'"
        )
    num_ranks = device.num_ranks(ranks)
    kept = os.environ.get("LORI_CACHE")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["LORI_CACHE"] = str(folder / "cache")
        try:
            _make(folder, rows, length)
            starts = [
                {"rows": number, "start": which, **_start(folder, number, num_ranks, length)}
                for number in dict.fromkeys((FEW, rows))
                for which in ("first", "second")
            ]
            seconds = _mapped(folder, rows, num_ranks, length)
            lengths = _lengths(folder, files.split(",") if files else [str(folder / f"{FEW}.jsonl")], length)
        finally:
            if kept is None:
                del os.environ["LORI_CACHE"]
            else:
                os.environ["LORI_CACHE"] = kept
    few, first, second = starts[1], starts[-2], starts[-1]
    return {
        "rows": [*starts, {"rows": rows, "start": "datasets.map", "first_step_seconds": round(seconds, 2)}],
        "ratios": {
            "tokens_over_map": round((first["first_step_seconds"] - few["first_step_seconds"]) / seconds, 3),
            "first_start_over_map": round(first["first_step_seconds"] / (few["first_step_seconds"] + seconds), 3),
            "second_start_seconds": round(second["first_step_seconds"] - few["first_step_seconds"], 2),
            "memory_bytes": second["peak_memory_bytes"] - few["peak_memory_bytes"],
            "data_wait": second["data_wait"],
            **_divisions(lengths, num_ranks),
        },
    }


# --- what is made ----------------------------------------------------------------------------------------------------


def _make(folder: Path, rows: int, length: int) -> None:
    make_llama(folder / "base", 2, 64, length, VOCABULARY)
    for number in dict.fromkeys((FEW, rows)):
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(_lines(number))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(FEW), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "base"
    )


def _lines(count: int) -> Iterator[str]:
    draws = random.Random(0)
    letters = "etaoinshrdlucmfwypvbg"
    words = ["".join(draws.choices(letters, k=draws.randint(1, 9))) for _ in range(WORDS)]
    weights = [1 / (place + 3) for place in range(WORDS)]
    for number in range(count):
        prompt, response = (
            " ".join(draws.choices(words, weights, k=draws.randint(*ends))) for ends in (PROMPT, RESPONSE)
        )
        yield json.dumps({"prompt": f"{prompt}?", "response": f" {response}\n#### {number}"}) + "\n"


# --- what is measured ------------------------------------------------------------------------------------------------


def _lengths(folder: Path, paths: Sequence[str], length: int) -> list[int]:
    """Tokens of the rows of files."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    found = list[int]()
    for path in paths:
        examples = encode(read(path, config.Template()), tokenizer, length)
        found += [example.num_tokens for example in examples]
    return found


def _divisions(lengths: Sequence[int], num_ranks: int) -> dict[str, Any]:
    """Idle share and computed tokens, of steps with rows drawn at random."""
    draws, size, micro = random.Random(0), config.Train().batch_size, config.Train().micro_batch_size
    sums = {name: [0.0, 0.0, 0.0] for name in ("by_rows", "by_tokens")}
    for _ in range(STEPS_DIVIDED):
        drawn = draws.choices(lengths, k=size)
        by_rows = [micro_batches(range(size), rank, num_ranks, micro) for rank in range(num_ranks)]
        for name, found in (("by_rows", by_rows), ("by_tokens", divided(drawn, num_ranks, micro))):
            loads = [sum(len(piece) * max((drawn[row] for row in piece), default=0) for piece in one) for one in found]
            for place, number in enumerate((max(loads), sum(loads) / num_ranks, sum(drawn) / num_ranks)):
                sums[name][place] += number
    return {
        "idle": {name: round(1 - mean / most, 4) for name, (most, mean, _) in sums.items()},
        "computed": {name: round(most / needed, 3) for name, (most, _, needed) in sums.items()},
    }


def _start(folder: Path, number: int, num_ranks: int, length: int) -> dict[str, Any]:
    """A training that is stopped after its first steps."""
    found = gang(_first_step, num_ranks, folder, number, length, time.time())
    shutil.rmtree(folder / "out")
    return found


def _first_step(world: World, folder: Path, number: int, length: int, started: float) -> dict[str, Any]:
    path = str(folder / f"{number}.jsonl")
    described = config.validate(
        {
            "name": "data",
            "model": {"path": str(folder / "base")},
            "tasks": {"rows": {"train": path, "test": path}},
            "adapter": {"rank": 4, "density": 1.0},
            "train": {"epochs": 1, "batch_size": 4 * world.size, "max_length": length, "checkpoint_every": None},
        }
    )
    ended, waits = list[float](), list[float]()

    def progress(record: dict[str, Any]) -> None:
        ended.append(time.time())
        waits.append(record["data_wait"] / record["seconds"])

    steps = iter(range(STEPS))
    try:
        train(
            described,
            "rows",
            world,
            folder / "out",
            fingerprint="",
            progress=progress,
            stop_request=lambda: Notice.NONE if next(steps) < STEPS - 1 else Notice.RUN,
        )
    except Preempted:
        dist.barrier()
    return {
        "first_step_seconds": round(ended[0] - started, 2) if ended else 0.0,
        "peak_memory_bytes": process_bytes("VmHWM"),
        "data_wait": round(statistics.median(waits[1:]), 5) if waits else 0.0,
    }


def _mapped(folder: Path, number: int, num_processes: int, length: int) -> float:
    """Seconds that `datasets` takes to read the rows and to make tokens of them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_map, args=(theirs, folder, number, num_processes, length))
    process.start()
    seconds: float = ours.recv()
    process.join()
    return seconds


def _map(sink: Any, folder: Path, number: int, num_processes: int, length: int) -> None:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts, responses = (
            tokenizer(rows[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response")
        )
        pairs = [(before, [*after, tokenizer.eos_token_id]) for before, after in zip(prompts, responses, strict=True)]
        return {
            "input_ids": [(before + after)[:length] for before, after in pairs],
            "labels": [([-100] * len(before) + after)[:length] for before, after in pairs],
        }

    start = time.perf_counter()
    found = datasets.load_dataset(
        "json", data_files=str(folder / f"{number}.jsonl"), split="train", cache_dir=str(folder / "datasets")
    )
    found.map(encode, batched=True, num_proc=num_processes, remove_columns=found.column_names)
    sink.send(time.perf_counter() - start)
