"""`lori data`: show rows as the model sees them."""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lori_dist import config, plugin
from lori_dist.commands._arguments import OVERRIDES, add_config
from lori_dist.errors import ConfigError

if TYPE_CHECKING:
    from lori_dist.training.data import Example, Segments
    from lori_dist.training.token_files import TokenFile

SUMMARY = "show rows as the model sees them: their text, their tokens, and what is learned"
HELP = f"""\
Prints the first rows of each task as text made by its template, and as tokens: what is learned is green on a terminal,
and stands in [brackets] elsewhere. Then, for each file of a task: rows, tokens, lengths, the share of tokens that is
learned, and how many rows lose something at train.max_length. Reads the rows and the tokenizer, no weights.

examples:
  lori data configs/quickstart.yaml
  lori data mine.yaml --task math --rows 5 train.max_length=2048

{OVERRIDES}"""

GREEN, PLAIN = "\033[32m", "\033[0m"
PERCENTILES = (50, 90, 99)
UNCUT = 2**30
"""Tokens of a row that is not cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--task", metavar="NAME", help="one task (default: all)")
    parser.add_argument("--rows", metavar="N", type=_count, default=1, help="rows of each task to print (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    if arguments.task is not None and arguments.task not in described.tasks:
        near = plugin.nearest(arguments.task, described.tasks)
        raise ConfigError(f"--task: got {arguments.task!r}; wanted one of {', '.join(described.tasks)}.{near}")
    from lori_dist.training.model_files import load_tokenizer

    tokenizer = load_tokenizer(described.model)
    for name in described.tasks if arguments.task is None else [arguments.task]:
        print("\n".join(_of_task(described, name, tokenizer, arguments.rows)))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number")
    return int(text)


def _of_task(run: config.Run, name: str, tokenizer: Any, num_rows: int) -> Iterator[str]:
    from lori_dist.training import token_cache
    from lori_dist.training.examples import encode, first_rows

    summary = []
    for number, (part, path) in enumerate(config.files(run.tasks[name])):
        source = token_cache.source_of(run, name, part, path)
        kept = token_cache.of_part(run, name, part, path, tokenizer)
        if number == 0:
            texts = first_rows(source, tokenizer, num_rows)
            for row, (text, whole) in enumerate(zip(texts, encode(texts, tokenizer, UNCUT), strict=True)):
                yield from _of_row(f"{name}, row {row + 1}", text, whole, kept[row], tokenizer)
        summary.append(f"{source.where}: {_summary(kept, run.train.max_length)}")
    yield from summary


def _of_row(title: str, text: "Segments", whole: "Example", kept: "Example", tokenizer: Any) -> Iterator[str]:
    from lori_dist.training.data import collate

    cut = "" if kept.num_tokens == whole.num_tokens else f", cut from {whole.num_tokens:,} to train.max_length"
    share = kept.num_targets / kept.num_tokens
    yield f"{title}: {kept.num_tokens:,} tokens{cut}; {kept.num_targets:,} are learned ({share:.0%})"
    yield "text:"
    yield "".join(_marked(piece, is_learned=bool(place % 2)) for place, piece in enumerate(text))
    yield "tokens:"
    ids = kept.prompt_ids + kept.response_ids
    labels = collate([kept], 0).labels[0].tolist()
    words = [_shown(tokenizer.convert_ids_to_tokens(token)) for token in ids]
    yield " ".join(
        _marked(f"{token}:{word}", is_learned=label == token)
        for token, word, label in zip(ids, words, labels, strict=True)
    )
    yield ""


def _shown(token: Any) -> str:
    return repr(token)[1:-1] if isinstance(token, str) else repr(token)


def _marked(text: str, *, is_learned: bool) -> str:
    # What a file says cannot move the cursor.
    text = "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)
    if not is_learned or not text:
        return text
    return f"{GREEN}{text}{PLAIN}" if sys.stdout.isatty() else f"[{text}]"


def _summary(kept: "TokenFile", max_length: int) -> str:
    lengths = sorted(kept.whole.tolist())
    tokens, targets = kept.sums(len(kept))
    spread = ", ".join(
        f"{share}% up to {lengths[math.ceil((len(lengths) - 1) * share / 100)]:,}" for share in PERCENTILES
    )
    num_cut = sum(length > max_length for length in lengths)
    lost = sum(lengths) - tokens
    cut = (
        f"{num_cut:,} rows ({num_cut / len(kept):.1%}) lose {lost:,} tokens at train.max_length={max_length:,}"
        if num_cut
        else f"none is cut at train.max_length={max_length:,}"
    )
    return (
        f"{len(kept):,} rows, {tokens:,} tokens, {targets:,} of them learned ({targets / tokens:.0%}); "
        f"tokens a row: {spread}, at most {lengths[-1]:,}; {cut}"
    )
