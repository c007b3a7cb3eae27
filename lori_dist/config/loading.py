"""Makes a checked run of a file, a tree and overrides, and a plain tree of a run."""

import contextlib
import gc
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist.config import yaml
from lori_dist.config._words import cut, found, unless
from lori_dist.config.check import Key, built, key_of, keys, plain, problems_of_keys
from lori_dist.config.rules import OF_THIS_MACHINE, RULES, as_far_as_known
from lori_dist.config.run import Run
from lori_dist.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Run:
    """The run described by a YAML file, with dotted overrides such as `train.lr=1e-4` applied.

    Relative paths in it are relative to the current directory. elsewhere: the run works on other machines, so that this
    one need not have its inputs. Raises ConfigError that lists every mistake by its path, with the nearest valid name.
    """
    with _without_collections():
        tree, problems = _read(path, overrides)
        return _checked(tree, problems, elsewhere=elsewhere)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python's search for cycles looks at every node of a large file again and again, which takes a third of the time
    that reading it does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def text(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """YAML of a configuration with overrides applied, otherwise as it was written. Raises ConfigError."""
    tree, problems = _read(path, overrides)
    return yaml.write(unless(problems, tree))


def has_engine(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a configuration itself names the engine, rather than leaving it at the default."""
    train = _read(path, overrides)[0].get("train")
    return isinstance(train, dict) and "engine" in train


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The tree in a YAML file with overrides applied, and the mistakes of these and of its keys."""
    tree, problems = yaml.parse(yaml.text_of(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, wanted a mapping with name, model and tasks")
    for override in overrides:
        problems += _override(tree, override)
    return tree, problems


def validate(tree: Mapping[str, Any]) -> Run:
    """The run a plain tree describes. Raises ConfigError that lists every mistake."""
    return _checked(dict(tree))


def dump(run: Run) -> dict[str, Any]:
    """The plain tree of a run. `validate` makes the same run of it."""
    return typing.cast(dict[str, Any], plain(run))


def _checked(tree: Any, before: Sequence[str] = (), *, elsewhere: bool = False) -> Run:
    """The run without a mistake. Raises ConfigError that lists `before` and every mistake.

    A misspelt key and a misspelt method are reported together: rules run on what is right, and end where they need a
    value that is not.
    """
    run, problems = built(Run, tree, "the configuration")
    listed = [*before, *problems, *problems_of_keys(run, elsewhere=elsewhere)]
    for rule in RULES:
        if not (elsewhere and rule in OF_THIS_MACHINE):
            listed += as_far_as_known(rule, run) if problems else rule(run)
    return unless(list(dict.fromkeys(listed)), run)


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Applies `path.to.key=value` to the tree. Returns the mistakes of the override."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        return [f"{cut(override)}: an override has the form path.to.key=value, such as train.lr=1e-4"]
    place = tree
    for depth, key in enumerate(parents):
        below = place.get(key)
        if below is None:
            below = place[key] = {}
        elif isinstance(below, str) and _is_choice(parents[: depth + 1]):
            below = place[key] = {"name": below}  # `engine: deepspeed` and `train.engine.stage=3` name one choice
        if not isinstance(below, dict):
            where = ".".join(parents[: depth + 1])
            return [f"{cut(override)}: {where} is {found(below)}, which has nothing below it; override {where} itself"]
        place = below
    try:
        place[last], problems = yaml.parse(text, cut(override))
    except ConfigError as error:
        return [str(error)]
    return problems


def _is_choice(place: Sequence[str]) -> bool:
    kind: Key | None = key_of(Run)
    for part in place:
        if kind is not None and kind.sections is not None:
            kind = key_of(kind.sections)
        else:
            kind = keys(kind.section).get(part) if kind is not None and kind.section is not None else None
    return kind is not None and kind.methods is not None
