"""The keys of a configuration that DeepSpeed reads, found from its own reader, which refuses unknown keys in most
sections and ignores them silently in others."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

MOST = 100
"""Mistakes that are named."""


class Asked(dict[str, Any]):
    """A mapping that remembers, in their order, which keys were asked for."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__({key: Asked(item) if isinstance(item, dict) else item for key, item in items.items()})
        self.asked: dict[str, None] = {}

    def __copy__(self) -> "Asked":  # DeepSpeed reads a copy
        return self

    def get(self, key: str, default: Any = None, /) -> Any:
        self.asked[key] = None
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked[key] = None
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:  # also of `**section`, which hands all of it to a model with known keys
        self._read_all()
        return super().__iter__()

    def _read_all(self) -> None:
        self.asked.update(dict.fromkeys(dict.keys(self)))
        for item in dict.values(self):
            if isinstance(item, Asked):
                item._read_all()

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return [(key, self[key]) for key in dict.keys(self)]

    def unread(self, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Keys that nobody has asked for, each with those of its section that somebody has."""
        for key, item in dict.items(self):
            if key not in self.asked:
                yield (*where, key), list(self.asked)
            elif isinstance(item, Asked):
                yield from item.unread((*where, key))

    def remove(self, place: tuple[str, ...]) -> None:
        section: Any = self
        for key in place[:-1]:
            section = dict.__getitem__(section, key)
        dict.pop(section, place[-1], None)


class _Keys:
    """Records which keys are read; testing whether a key is present does not count as reading it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self.asked

    def __iter__(self) -> Iterator[str]:
        return iter(self.asked)


Mistake = tuple[tuple[str, ...], Any, str | None, list[str]]
"""A key's place, its value, what DeepSpeed says of it (None: that it is unknown), and the keys that it knows there."""


def mistakes(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """All that DeepSpeed's reader refuses, and all that it never asks for."""
    asked = Asked(tree)
    with _quiet():
        for _ in range(MOST):
            asked.asked.clear()
            try:
                DeepSpeedConfig(asked)
            except pydantic.ValidationError as error:
                found = [_mistake(asked, item, error.title) for item in error.errors(include_url=False)]
                yield from found
                if not all(place for place, *_ in found):
                    return
                for place, *_ in found:
                    asked.remove(place)
                continue
            except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, AttributeError) as error:
                yield (), None, " ".join(str(error).split()) or type(error).__name__, []
                return
            break
    for place, known in asked.unread():
        yield place, None, None, known


def _mistake(asked: Asked, item: Any, title: str) -> Mistake:
    loc = tuple(str(part) for part in item["loc"])
    sections = [key for key in asked.asked if isinstance(dict.get(asked, key), Asked)]
    inside = next((key for key in reversed(sections) if _has(dict.__getitem__(asked, key), loc)), None)
    place = loc if inside is None and _has(asked, loc) else (inside, *loc) if inside is not None else ()
    if item["type"] == "extra_forbidden":
        return place or loc, item["input"], None, _fields(title, loc)
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "wanted")
    where = place or tuple(sections[-1:])
    return where, item["input"], message, []


def _has(section: Any, place: tuple[str, ...]) -> bool:
    for key in place:
        if not isinstance(section, dict) or not dict.__contains__(section, key):
            return False
        section = dict.__getitem__(section, key)
    return bool(place)


def _fields(title: str, place: tuple[str, ...]) -> list[str]:
    """The keys of a model of DeepSpeed's, or of one inside it."""
    models = {model.__name__: model for model in _below(DeepSpeedConfigModel)}
    model: Any = models.get(title)
    for key in place[:-1]:
        field = None if model is None else model.model_fields.get(key)
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field is not None else []
        model = next(
            (kind for kind in inner if isinstance(kind, type) and issubclass(kind, DeepSpeedConfigModel)), None
        )
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _below(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's reader logs what is said here in other words."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
