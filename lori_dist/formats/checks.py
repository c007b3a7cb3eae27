"""Checks of JSON that somebody else may have written: what it says is used only where it has the form it must have."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lori_dist.errors import AdapterError
from lori_dist.files import parse_json, read_regular

HEX = re.compile(r"[0-9a-f]{16}\Z")
MAX_ENTRIES = 2**31 - 1
"""Most entries of A or B of one module, as positions are int32."""
MAX_NUMBER = 1e38
MAX_JSON_BYTES = 1 << 24
"""Most bytes of a JSON file. Parsed, it can take thirty times its size."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises AdapterError that names the file, for whatever else is there."""
    try:
        found = parse_json(read_regular(path, MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be read: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise AdapterError(f"{path.name} is not valid JSON ({named(str(error))}); save the adapter again") from error
    require(isinstance(found, dict), path.name, found, "an object")
    return found  # type: ignore[no-any-return]


def check_hash(where: str, value: Any) -> None:
    require(isinstance(value, str) and HEX.match(value) is not None, where, value, "16 digits of 0-9a-f")


def check_name(where: str, value: Any) -> None:
    require(isinstance(value, str) and value != "", where, value, "a text that is not empty")


def check_choice(where: str, value: Any, choices: Mapping[str, Any]) -> None:
    require(isinstance(value, str) and value in choices, where, value, f"one of {', '.join(choices)}")


def check_integer(where: str, value: Any, smallest: int, largest: int) -> None:
    fits = type(value) is int and smallest <= value <= largest  # bool is an int too
    require(fits, where, value, f"an integer from {smallest} to {largest}")


def require(fits: bool, where: str, value: Any, wanted: str) -> None:
    if not fits:
        raise AdapterError(f"{where} is {shown(value)}; it must be {wanted}")


def named(name: Any) -> str:
    """A name for messages, which must stay short and printable whatever is in the file."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 120 else shown(name)


def shown(value: Any) -> str:
    """A value for messages."""
    if isinstance(value, str):
        return ascii(value[:120])
    if isinstance(value, int) and abs(value) > 2**64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list) and len(value) <= 3 and all(isinstance(item, str) and len(item) <= 60 for item in value):
        return f"[{', '.join(map(ascii, value))}]"
    return f"of type {type(value).__name__}"


def check_number(where: str, value: Any) -> None:
    """Finite, and small enough to be a float32."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    require(fits, where, value, "a finite number")


def check_flag(where: str, value: Any) -> None:
    require(isinstance(value, bool), where, value, "true or false")
