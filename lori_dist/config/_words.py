"""Words that messages share: how they name what was found."""

from collections.abc import Sequence
from typing import Any, TypeVar

from lori_dist.errors import ConfigError

T = TypeVar("T")


def found(value: Any) -> str:
    """The words for a value that was found, cut to a readable length."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    if type(value) in kinds:
        return kinds[type(value)]
    try:
        return cut(repr(value))
    except ValueError:  # more digits than Python makes text of
        return "a large number"


def cut(text: str) -> str:
    """A text, without its middle if it is longer than 200 characters."""
    return text if len(text) <= 200 else f"{text[:150]}...{text[-20:]}"


def unless(problems: Sequence[str], found: T) -> T:
    """Returns `found`. Raises ConfigError with the problems if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))
    return found
