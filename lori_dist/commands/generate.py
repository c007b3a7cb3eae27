"""`lori generate`: write text with base, adapters and merges, side by side."""

import argparse
import functools
import json
import os
import select
import shutil
import string
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_dist import config, plugin, tables
from lori_dist.commands._arguments import OVERRIDES, add_config, add_local_rank, check_writable
from lori_dist.commands._endings import message_of
from lori_dist.commands._runs import finished_adapters, is_adapter
from lori_dist.errors import ConfigError

if TYPE_CHECKING:
    from lori_dist.evaluation._generate import Prompt
    from lori_dist.training.world import World

SUMMARY = "write text with base, adapters and merges, side by side"
HELP = f"""\
Writes what models say to prompts: those of --prompt, of a file, or lines that are typed or piped in. A prompt is a
user's message where the tokenizer has a chat template, else text that the model continues. An adapter is a file, a
folder, or the name of a task or merge that a run of this configuration has finished; where a file has an update for
each task, ADAPTER@TASK is one of them. `base` is the model without one, and the default. Several models stand side by
side, a column each. Under a launcher, the ranks hold the base as evaluate.engine says (default: train.engine).

examples:
  lori generate run.yaml --adapter math --prompt "What is 12 + 30?"
  lori generate run.yaml --adapter base --adapter math --adapter merged.safetensors --file prompts.txt --out texts.jsonl
  lori generate run.yaml --adapter math --temperature 0.7 --top-p 0.9 --seed 1
  torchrun --nproc-per-node 8 -m lori_dist generate run.yaml --file prompts.txt evaluate.engine=fsdp

{OVERRIDES}"""

NARROWEST, GAP = 16, 2
"""Characters of a column, and between two."""
ALIVE_SECONDS = 60.0
"""Seconds after which ranks that wait for a line hear that nobody has typed one: no collective waits for minutes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        action="append",
        help="adapter file or folder, name of a finished task or merge, or `base`; can be repeated, a column each",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", action="append", help="prompt; can be repeated")
    given.add_argument(
        "--file",
        metavar="FILE",
        help="file of prompts: the lines of a .txt file; else rows (JSON lines, CSV, Parquet) with a field `prompt` or "
        "`messages`",
    )
    parser.add_argument(
        "--task", metavar="NAME", help="put prompts into the template of this task, which has one field"
    )
    parser.add_argument(
        "--raw", action="store_true", help="give the model prompts as they are, without a chat template"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_count, help="longest text (default: evaluate.max_new_tokens)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_temperature,
        help="draw tokens (default: evaluate.temperature, or 0: the likeliest)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=_share,
        help="draw from the likeliest tokens with this probability (default: evaluate.top_p, 1)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="of the tokens that are drawn (default: evaluate.seed, 0)"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write prompts and texts as JSON lines")
    add_local_rank(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number of at least 0")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number above 0, of at most 1")
    return number


def run(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    for name in ("temperature", "top_p", "seed"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(described.evaluate, name))
    if arguments.top_p < 1 and arguments.temperature == 0:
        raise ConfigError("--top-p: is for tokens that are drawn; add --temperature, or remove it")
    adapters = _adapters(described, arguments.adapter or ["base"])
    fill = _filled(described, arguments.task)
    prompts = _given(arguments, fill)
    from lori_dist.cluster import scratch
    from lori_dist.cluster.failures import member

    scratch.check()
    with member(functools.partial(message_of, verbose=arguments.verbose)) as watch:
        _generate(described, adapters, prompts, fill, arguments, watch)


def _adapters(described: config.Run, words: Sequence[str]) -> dict[str, Path | None]:
    """Heading of a column -> adapter; None is the base."""
    lacking = [word for word in words if word != "base" and not is_adapter(word)]
    made = finished_adapters(described) if lacking else {}
    found: dict[str, Path | None] = {}
    for word in words:
        if word == "base":
            found[word] = None
        elif word in made:
            found[word] = made[word]
        elif (of_task := word.partition("@"))[0] in made:
            found[word] = Path(f"{made[of_task[0]]}@{of_task[2]}")
        elif is_adapter(word):
            found[word] = Path(word)
        else:
            known = ", ".join(["base", *made])
            raise ConfigError(
                f"--adapter: {word!r} is not a file or folder, and the run has finished no such adapter; "
                f"there are {known}.{plugin.nearest(word, ['base', *made])}"
            )
    return found


def _filled(described: config.Run, task: str | None) -> Callable[[str], str]:
    """Returns a function that makes a prompt of a text, by the template of a task."""
    if task is None:
        return lambda text: text
    if task not in described.tasks:
        known = ", ".join(described.tasks)
        raise ConfigError(f"--task: unknown task {task!r}; there are {known}.{plugin.nearest(task, described.tasks)}")
    template = described.tasks[task].template
    parts = [] if template.messages is not None else string.Formatter().parse(template.prompt)
    names = [name for _, name, _, _ in parts if name]
    if len(set(names)) != 1:
        raise ConfigError(
            f"--task: the prompt of tasks.{task}.template has {len(set(names))} fields, and one is filled; "
            "remove --task and give whole prompts"
        )
    return lambda text: template.prompt.format_map({names[0]: text})


def _given(arguments: argparse.Namespace, fill: Callable[[str], str]) -> "list[Prompt] | None":
    """The prompts of the command line or of a file; None where they are typed."""
    if arguments.prompt is not None:
        return [fill(text) for text in arguments.prompt]
    if arguments.file is None:
        return None
    found: list[Prompt]
    try:
        if arguments.file.endswith(".txt"):
            lines = Path(arguments.file).read_text(encoding="utf-8").splitlines()
            found = [fill(line) for line in lines if line.strip()]
        else:
            rows = tables.read(arguments.file)
            found = [_of_row(row, f"{arguments.file}: row {number}", fill) for number, row in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: {arguments.file} cannot be read ({error}); give a file of prompts") from error
    if not found:
        raise ConfigError(f"--file: {arguments.file} has no prompts; give at least one")
    return found


def _of_row(row: Any, where: str, fill: Callable[[str], str]) -> "Prompt":
    if isinstance(row, ConfigError):
        raise ConfigError(f"--file: {row}")
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        return fill(row["prompt"])
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return list(row["messages"])
    raise ConfigError(f"--file: {where} has neither a text `prompt` nor a list `messages`; give one of them")


def _generate(
    described: config.Run,
    adapters: Mapping[str, Path | None],
    prompts: "list[Prompt] | None",
    fill: Callable[[str], str],
    arguments: argparse.Namespace,
    watch: "Callable[[World], None]",
) -> None:
    import torch.distributed as dist

    from lori_dist.evaluation._generate import writing
    from lori_dist.evaluation._writing import Sampling
    from lori_dist.training.accelerate_launch import followed
    from lori_dist.training.world import from_environment, from_first

    described = followed(described, os.environ, has_engine=config.has_engine(arguments.config, arguments.settings))
    world = from_environment()
    watch(world)
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    length = arguments.max_new_tokens or described.evaluate.max_new_tokens
    is_first = world.rank == 0
    if is_first and arguments.out is not None and arguments.out.is_file():
        arguments.out.unlink()
    options: dict[str, Any] = {"max_new_tokens": length, "sampling": sampling, "is_raw": arguments.raw}
    with writing(described, adapters, world, **options) as write:
        typed = iter([prompts]) if prompts is not None else _typed(fill, waits=world.size == 1)
        while (some := from_first(world, lambda: next(typed, None))) is not None:
            texts = write(some) if some else []
            if is_first:
                _show(some, texts, arguments.out)
    dist.destroy_process_group()


def _typed(fill: Callable[[str], str], *, waits: bool) -> "Iterator[list[Prompt]]":
    """The lines of standard input, one at a time; nothing where none has come for a while, unless it `waits`."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        while not waits and not select.select([sys.stdin], [], [], ALIVE_SECONDS)[0]:
            yield []
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield [fill(line.rstrip("\r\n"))]


def _show(prompts: "Sequence[Prompt]", texts: Sequence[Mapping[str, str]], out: Path | None) -> None:
    for prompt, of_models in zip(prompts, texts, strict=True):
        if len(prompts) > 1:
            print(_shown(prompt), end="\n\n")
        print(_columns(of_models), end="\n\n" if len(prompts) > 1 else "\n", flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": prompt, "texts": dict(of_models)}, ensure_ascii=False) + "\n")


def _shown(prompt: "Prompt") -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def _columns(texts: Mapping[str, str]) -> str:
    """One text as it is; several side by side under their names, as wide as the terminal."""
    if len(texts) == 1:
        return next(iter(texts.values()))
    room = shutil.get_terminal_size().columns - GAP * (len(texts) - 1)
    width = max(NARROWEST, room // len(texts))
    columns = [[*_wrapped(name, width), "-" * width, *_wrapped(text, width)] for name, text in texts.items()]
    height = max(map(len, columns))
    lines = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join((" " * GAP).join(cell.ljust(width) for cell in line).rstrip() for line in lines)


def _wrapped(text: str, width: int) -> list[str]:
    wrap = functools.partial(textwrap.wrap, width=width, replace_whitespace=False, drop_whitespace=False)
    return [piece for line in text.splitlines() or [""] for piece in wrap(line) or [""]]
