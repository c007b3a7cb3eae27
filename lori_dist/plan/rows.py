"""Numbers of tokens in rows: counted with the model's tokenizer, in all rows or in some."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import config, rows, tables
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.training import data, token_cache
from lori_dist.training.model import load_tokenizer

BYTES = 16_000_000
"""Bytes of text that are counted with a tokenizer, over all files of a run: some seconds. Larger files are sampled at
equal distances."""
SECONDS = 20.0
"""Seconds spent on counting the rows of a run's files; the number of rows of larger files is estimated from their
size."""
BYTES_PER_TOKEN = 4
"""Bytes of text per token where there is no tokenizer: usual for English with a vocabulary of 100,000 tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a file's rows."""

    number: int
    """Number of rows in the file that are used."""
    tokens: npt.NDArray[np.int64]
    """Tokens of each counted row, prompt and response together, cut to train.max_length."""
    how: str
    """`all`: with the tokenizer, in all rows; `some`: in a sample; `estimated`: from bytes; `given`: not looked at."""
    is_rough: bool = False
    """Whether the number of rows is estimated."""
    answer: int = 0
    """Tokens of the longest response among the counted rows."""

    @property
    def mean(self) -> float:
        """Mean tokens of a row."""
        return float(self.tokens.mean())


class Counter:
    """Counts a run's files, each once."""

    def __init__(self, run: Run, row_tokens: int | None = None) -> None:
        """row_tokens: taken for every row, without a look at it."""
        self.run, self.row_tokens = run, row_tokens
        self.found: dict[tuple[str, str], Lengths] = {}
        self.tokenizer = None if row_tokens is not None else _tokenizer(run)
        paths = [path for task in run.tasks.values() for _, path in config.files(task)]
        sizes = [BYTES if tables.is_hub(path) else os.path.getsize(path) for path in paths]
        # Of each file, where all are more than may be read.
        self.bytes = BYTES if sum(sizes) <= BYTES else max(1, BYTES // len(paths))
        self.seconds = SECONDS / len(paths)

    def of(self, task: str, part: str, path: str, *, needs_number: bool = True) -> Lengths:
        """The lengths of a task's file. part: its key there, for messages. needs_number: whether the number of rows
        changes the plan. Raises ConfigError as the training would."""
        if (task, path) not in self.found:
            self.found[task, path] = self._count(task, part, path, needs_number)
        return self.found[task, path]

    def _count(self, task: str, part: str, path: str, needs_number: bool) -> Lengths:
        where, template = f"tasks.{task}.{part}", self.run.tasks[task].template
        if self.row_tokens is not None:
            number, is_rough = self._number(path, where) if needs_number else (1, False)
            length = min(self.row_tokens, self.run.train.max_length)
            return Lengths(number=number, tokens=np.array([length]), how="given", is_rough=is_rough, answer=length)
        if not tables.is_hub(path) and os.path.getsize(path) <= self.bytes and not _is_compressed(path):
            return self._all(task, part, path)
        sampled, number, is_rough = self._sampled(path, where)
        if is_rough and needs_number and number == 0:
            raise ConfigError(
                f"{where}: the rows of {path} cannot be counted within {SECONDS:.0f} seconds; plan with train.steps "
                "instead of train.epochs"
            )
        if not sampled:  # or the error would not say where
            return self._all(task, part, path)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "rows.jsonl"
            copy.write_text("".join(json.dumps(row) + "\n" for row in sampled), encoding="utf-8")
            try:
                found = self._lengths(str(copy), template, where, "all" if len(sampled) == number else "some")
            except ConfigError as error:
                raise ConfigError(str(error).replace(str(copy), path)) from error
        return Lengths(**{**found, "number": number or len(sampled), "is_rough": is_rough})

    def _all(self, task: str, part: str, path: str) -> Lengths:
        template, where = self.run.tasks[task].template, f"tasks.{task}.{part}"
        if self.tokenizer is None:
            return Lengths(**self._lengths(path, template, where, "all"))
        tokens = token_cache.of_part(self.run, task, part, path, self.tokenizer).lengths
        return Lengths(number=len(tokens), tokens=tokens, how="all")

    def _lengths(self, path: str, template: config.Template, where: str, how: str) -> dict[str, Any]:
        if self.tokenizer is not None:
            texts = data.read(path, template, where=where, tokenizer=self.tokenizer)
            encoded = data.encode(texts, self.tokenizer, self.run.train.max_length, where=where)
            tokens = np.array([example.num_tokens for example in encoded], dtype=np.int64)
            answer = max(len(example.response_ids) for example in encoded)
        else:
            how = "estimated"
            found = list(rows.read(path, template, where=where))
            tokens = np.array([_estimated(text) for text in found], dtype=np.int64)
            tokens = tokens.clip(max=self.run.train.max_length)
            answer = min(max(map(_estimated_answer, found)), self.run.train.max_length)
        return {"number": len(tokens), "tokens": tokens, "how": how, "answer": answer}

    def _sampled(self, path: str, where: str) -> tuple[list[Any], int, bool]:
        """Rows at equal distances, the number of rows (0 if there is none), and whether that is an estimate."""
        kept: list[tuple[Any, int]] = []
        stride, size, seen, seen_bytes = 1, 0, 0, 0
        deadline = time.monotonic() + self.seconds
        try:
            for place, (_, row) in enumerate(tables.read(path)):
                seen += 1
                text = "" if isinstance(row, ConfigError) else json.dumps(row, ensure_ascii=False, default=str)
                num_bytes = len(text.encode("utf-8", "surrogatepass"))
                seen_bytes += num_bytes + 1
                if place % stride == 0 and text:
                    kept.append((row, num_bytes))
                    size += num_bytes
                while size > self.bytes and len(kept) > 1:
                    kept, stride = kept[::2], 2 * stride
                    size = sum(one for _, one in kept)
                if time.monotonic() > deadline:
                    break
            else:
                return [row for row, _ in kept], seen, False
        except OSError as error:
            raise ConfigError(f"{where}: {path} cannot be read ({error.strerror})") from error
        is_text = not tables.is_hub(path) and path.lower().endswith((".jsonl", ".json", ".csv", ".tsv", ".txt"))
        number = round(os.path.getsize(path) * seen / max(1, seen_bytes)) if is_text else 0
        return [row for row, _ in kept], number, True

    def _number(self, path: str, where: str) -> tuple[int, bool]:
        _, number, is_rough = self._sampled(path, where)
        if not number:
            raise ConfigError(f"{where}: the rows of {path} cannot be counted; plan with train.steps")
        return number, is_rough


def _tokenizer(run: Run) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(run.model)
    except ConfigError:
        return None


def _estimated(text: rows.Text) -> int:
    """Estimated tokens of (prompt, response), or of a chat, with bos and eos."""
    if isinstance(text, rows.Chat):
        more = [json.dumps(calls) for message in text.messages if (calls := message.get("tool_calls"))]
        parts = [
            *(message["content"] for message in text.messages),
            *more,
            json.dumps(text.tools) if text.tools else "",
        ]
    else:
        parts = list(text)
    size = sum(len(part.encode("utf-8", "surrogatepass")) for part in parts)
    return 2 + -(-size // BYTES_PER_TOKEN)


def _estimated_answer(text: rows.Text) -> int:
    """Estimated tokens of a response and the one that ends it, or of the last message of a chat."""
    answer = str(text.messages[-1]["content"]) if isinstance(text, rows.Chat) else text[-1]
    return 1 - (-len(answer.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".bz2", ".xz", ".zst", ".zip", ".parquet"))


def how_counted(found: Sequence[Lengths], model: str) -> str:
    """A sentence for people on how the rows were counted."""
    tokens = np.concatenate([one.tokens for one in found])
    number, counted = sum(one.number for one in found), len(tokens)
    spread = f"{tokens.min():,} to {tokens.max():,} tokens a row, {_mean(found):,.1f} on average"
    about = "about " if any(one.is_rough for one in found) else ""
    kinds = {one.how for one in found}
    if "given" in kinds:
        return f"{tokens.max():,} tokens in every row, as given"
    if "estimated" in kinds:
        return f"{spread}, estimated as {BYTES_PER_TOKEN} bytes of text a token: {model} has no tokenizer"
    part = f"{counted:,} of {about}{number:,}" if "some" in kinds or about else f"all {number:,}"
    return f"{spread}, counted with the model's tokenizer in {part} rows"


def _mean(found: Sequence[Lengths]) -> float:
    return sum(one.number * one.mean for one in found) / sum(one.number for one in found)
