"""The kinds of values that keys take, and what a key says beside its range: its check, and what it means for results.

A key is a field of a section. Its annotation holds its kind and range, a Check where the range does not say all, and a
Fingerprint where the result does not simply follow from its value; the text below it describes it.
"""

import contextlib
import datetime
import enum
import os
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

T = typing.TypeVar("T")


class Fingerprint(enum.Enum):
    """The place of a key in the fingerprints of jobs, which say whether a finished result is that of a configuration.

    A key without such a mark is part of them with its value: another value is another result. A mark on a key that
    holds a section is that of all keys in it.
    """

    IF_SET = "if set"
    """The value is part of fingerprints where it is not the default; results from before the key existed stay valid."""
    DERIVED = "derived"
    """The value is not part of fingerprints, but what follows from it is, such as a file's content or the seed of a
    task's A."""
    NEVER = "never"
    """The key says where or how a result is computed, and changes it by rounding at most."""


class Check(typing.NamedTuple):
    """A check of values that have the right kind and range. It is skipped for null."""

    problems: Callable[[Any], Iterator[str]]
    """Yields the mistakes of a value, as `what was found; the remedy`."""
    is_of_this_machine: bool = False
    """Whether the check looks at this machine's files or packages, which a run on other machines need not have."""


Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""Names become folder names: nothing in them can leave the run's folder."""


def _number(value: Any) -> Any:
    """Refuses true and false, which would pass for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("wanted a number")
    return value


def read_off(value: Any) -> Any:
    """Returns "off" for false, since YAML 1.1 reads `off` as false."""
    return "off" if value is False else value


def _seconds(value: Any) -> Any:
    """Seconds, given as a number or as text such as `11h30m`."""
    if not isinstance(value, str) or value.replace(".", "", 1).isdecimal():
        return value
    found = re.fullmatch(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", value)
    if found is None or not value:
        raise ValueError("wanted a duration such as 11h30m, 1m30s, or 3600 for so many seconds")
    return sum(int(number or 0) * unit for number, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


NotBool = pydantic.BeforeValidator(_number)
Positive = Annotated[int, pydantic.Field(gt=0), NotBool]
Count = Annotated[int, pydantic.Field(ge=0), NotBool]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False), NotBool]
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), NotBool]
Duration = Annotated[
    float,
    pydantic.Field(gt=0, allow_inf_nan=False),
    NotBool,
    pydantic.BeforeValidator(_seconds, json_schema_input_type=float | str),
]
Fraction = Annotated[float, pydantic.Field(gt=0, le=1), NotBool]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1), NotBool]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**53), NotBool]
"""A seed below 2**53, so that every reader of JSON keeps its digits."""
Dtype = Literal["float32", "bfloat16", "float16"]
FilePath = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
Text = Annotated[str, pydantic.Field(min_length=1)]


def _date(value: Any) -> Any:
    """A date as text, whether YAML has made a date of it or not."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(value, "%Y-%m-%d").date().isoformat()
    raise ValueError("wanted a date such as 2026-01-31")


Date = Annotated[str, pydantic.BeforeValidator(_date)]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """Makes a class a section of the configuration: a frozen dataclass that refuses unknown keys.

    The text below a key is its description in the JSON schema and in the reference of all settings.
    """
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@section
class Choice:
    """A method chosen by name. Written as `magnitude`, or with options as `{name: deepspeed, stage: 3}`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        return {"name": value.get("name"), "options": {key: item for key, item in value.items() if key != "name"}}
    return value


class Methods(typing.NamedTuple):
    """The methods that a Choice chooses from: their folder, and the name of their functions."""

    folder: str
    role: str


MASKS, ENGINES = Methods("masks", "mask"), Methods("engines", "build")
FORMS = Methods("forms", "form")
PLACERS = Methods("engines", "place")
MERGES, PLANS = Methods("merges", "merge"), Methods("multitask", "plan")
Chosen = pydantic.BeforeValidator(_choice)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "all-linear" else value


Listed = pydantic.BeforeValidator(_listed, json_schema_input_type=Text | tuple[Text, ...])
