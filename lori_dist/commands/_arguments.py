"""Arguments that several verbs take: a configuration and its overrides, a run, options of a method, a file to write."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist import config
from lori_dist.atomic import write_text
from lori_dist.errors import ConfigError

OVERRIDES = """\
overrides:
  KEY=VALUE changes the configuration without editing the file; KEY is the dotted path of a field, VALUE is YAML:
    train.lr=1e-4   train.engine=fsdp   train.engine.stage=3   tasks.math.train=data/math.jsonl
"""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the configuration")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="overrides; see below")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN, a configuration or a run's folder, and overrides."""
    parser.add_argument("run", metavar="RUN", help="YAML file of the run, or its folder")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="overrides; see below")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Adds --local_rank, which the deepspeed launcher puts before or after the verb. The environment has the same
    number."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def is_option(word: str) -> bool:
    """Whether a word has the form NAME=VALUE."""
    return re.match(r"[A-Za-z_]\w*=", word) is not None


def options(words: Sequence[str]) -> dict[str, Any]:
    """Returns options of a method, from words such as `density=0.5`. Raises ConfigError."""
    read = {}
    for word in words:
        if not is_option(word):
            raise ConfigError(f"{word}: an option of a method has the form NAME=VALUE, such as density=0.5")
        name, _, text = word.partition("=")
        read[name] = config.value(text, word)
    return read


def check_writable(path: Path, where: str) -> None:
    """Raises ConfigError if a file cannot be written: before long work, whose result would be lost at its end."""
    is_waited_for = path.exists() and not path.is_file() and not path.is_relative_to("/dev")
    if path.is_dir() or not path.absolute().parent.is_dir() or is_waited_for:
        raise ConfigError(f"{where}: {str(path)!r} cannot be a file; give a file's name in a folder that exists")


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a file that appears complete, or writes into something else, such as /dev/stdout."""
    text = json.dumps(tree, indent=2) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)
