"""Makes sections of a plain tree, and finds everything that is wrong with their keys, all at once.

What is wrong is left out of the object that is made: the rules of rules.py run on what is right.
"""

import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any

import pydantic

from lori_dist import plugin
from lori_dist.config._words import found, unless
from lori_dist.config.kinds import Check, Choice, Fingerprint, Methods, T
from lori_dist.config.yaml import Place, unshared, usable
from lori_dist.errors import ConfigError


def checked(kind: type[T], tree: Any, where: str) -> T:
    """Returns the object of a section from a plain tree. Raises ConfigError that lists every mistake.

    where: what the tree is of, such as the path of a file.
    """
    made, problems = built(kind, tree, where)
    return unless([*problems, *problems_of_keys(made)], made)


def built(kind: type[T], tree: Any, where: str) -> tuple[T, list[str]]:
    """Returns the object of a section, without the values that are wrong, and the mistakes of the tree alone."""
    problems: dict[Place, str] = {}
    made: T = _made(kind, usable(unshared(tree, where), (), problems), (), problems)
    return made, [f"{'.'.join(place) or where}: {problem}" for place, problem in problems.items()]


def problems_of_keys(made: Any, place: Place = (), *, elsewhere: bool = False) -> Iterator[str]:
    """Yields the mistakes that the checks of keys find in a section, which may lack values.

    elsewhere: leaves out those of this machine.
    """
    for name, key in keys(made.__class__).items():
        value = getattr(made, name, None)
        if value is None:
            continue
        where = (*place, name)
        for check in key.checks:
            if not (elsewhere and check.is_of_this_machine):
                yield from (f"{'.'.join(where)}: {problem}" for problem in check.problems(value))
        if key.section is not None:
            yield from problems_of_keys(value, where, elsewhere=elsewhere)
        for inner, item in value.items() if key.sections is not None else ():
            yield from problems_of_keys(item, (*where, inner), elsewhere=elsewhere)


def plain(value: Any) -> Any:
    """The plain tree of a section, or of a value in one."""
    if isinstance(value, Choice):
        return {"name": value.name, **value.options}
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def default_of(item: "Field[Any]") -> Any:
    """The default of a key; MISSING if it has none."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def fingerprinted(section: Any) -> dict[str, Any]:
    """The keys of a section that are part of fingerprints, with their values as plain values."""
    default = {item.name: default_of(item) for item in fields(section)}
    return {
        name: plain(getattr(section, name))
        for name, key in keys(section.__class__).items()
        if key.fingerprint is None
        or (key.fingerprint is Fingerprint.IF_SET and getattr(section, name) != default[name])
    }


MOST_NAMED = 100
"""Largest number of unknown keys of one section that are named and compared with the known ones."""
ABSENT: Any = object()
"""Placeholder for a value that is wrong."""


def _made(section: type, value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """The object of a section without the values that are wrong: reading one of them raises AttributeError."""
    made: Any = object.__new__(section)
    if not isinstance(value, dict):
        problems.setdefault(place, f"got {found(value)}; wanted a mapping, key: value")
        return made
    kinds = keys(section)
    unknown = [key for key in value if key not in kinds]
    strange = {key: plugin.closest(key, kinds) for key in unknown[:MOST_NAMED]}
    if others := unknown[MOST_NAMED:]:
        problems.setdefault(place, f"has {len(others):,} more unknown keys; there are {', '.join(kinds)}")
    for item in fields(section):
        where = (*place, item.name)
        if item.name not in value and item.name in strange.values():
            continue  # it is there, misspelt
        if item.name in value:
            content = _value_of(section, item.name, value[item.name], where, problems)
        elif (default := default_of(item)) is not MISSING:
            content = default
        else:
            problems[where] = "is missing; give it a value"
            continue
        if content is not ABSENT:
            object.__setattr__(made, item.name, content)
    for key, meant in strange.items():
        near = "" if meant is None else f" Did you mean {meant!r}?"
        problems.setdefault((*place, key), f"unknown key; there are {', '.join(kinds)}.{near}")
    return made


def _value_of(section: type, key: str, value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """The value of a key as its annotation reads it, or ABSENT."""
    kind = keys(section)[key]
    if place in problems:
        return ABSENT
    if kind.section is not None and not (value is None and kind.is_optional):
        made = _made(kind.section, value, place, problems)
        return made if isinstance(value, dict) else ABSENT
    if kind.sections is not None and isinstance(value, dict):
        made = {name: _made(kind.sections, item, (*place, name), problems) for name, item in value.items()}
        if not all(isinstance(item, dict) for item in value.values()):
            return ABSENT  # keys of one section, written where sections are named
        value = made
    try:
        content = _adapter(section, key).validate_python(value)
    except pydantic.ValidationError as error:
        for below, errors in _places(error).items():
            problems.setdefault((*place, *below), _problem(errors))
        return ABSENT
    if kind.methods is not None and content is not None:
        path = ".".join(place)
        try:
            plugin.find(kind.methods.folder, content.name, kind.methods.role, path).bind(content.options, path)
        except ConfigError as error:
            lines = [line.partition(": ") for line in str(error).split("\n")]
            problems.update({tuple(where.split(".")): problem for where, _, problem in lines})
            return ABSENT
    is_usable = kind.sections is not None or not any(other[: len(place)] == place for other in problems)
    return content if is_usable else ABSENT


class Key(typing.NamedTuple):
    """The kind of a key's value (a section, sections by their names, a method, or any other value), and the key's
    marks."""

    hint: Any
    section: Any = None
    sections: Any = None
    is_optional: bool = False
    methods: Methods | None = None
    checks: tuple[Check, ...] = ()
    fingerprint: Fingerprint | None = None


@functools.cache
def keys(section: type) -> Mapping[str, Key]:
    """The keys of a section by their names."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {item.name: key_of(hints[item.name]) for item in fields(section)}


def key_of(hint: Any) -> Key:
    """The key that an annotation describes."""
    marks = getattr(hint, "__metadata__", ())
    # Of several marks the last counts: that of the key itself comes after that of its kind.
    fingerprint = next((mark for mark in reversed(marks) if isinstance(mark, Fingerprint)), None)
    checks = tuple(mark for mark in marks if isinstance(mark, Check))
    methods = next((mark for mark in marks if isinstance(mark, Methods)), None)
    made = Key(hint, methods=methods, checks=checks, fingerprint=fingerprint)
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    inner = typing.get_args(bare)
    if typing.get_origin(bare) is dict and _is_section(inner[1]):
        return made._replace(sections=inner[1])
    if _is_section(bare):
        return made._replace(section=bare)
    if typing.get_origin(bare) is types.UnionType and _is_section(inner[0]):
        return made._replace(section=inner[0], is_optional=True)
    return made


@functools.cache
def _adapter(section: type, key: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(keys(section)[key].hint)


def _is_section(kind: Any) -> bool:
    return is_dataclass(kind) and kind is not Choice


def _places(error: pydantic.ValidationError) -> dict[Place, list[Any]]:
    """The errors by place. If a value fits none of several kinds, the errors of those that got furthest into it
    count."""
    skipped = ("function-", "literal[", "tuple[", "dict[", "[key]")  # the kind of value that was tried
    places: dict[Place, list[Any]] = {}
    for item in error.errors(include_url=False):
        place = tuple(str(part) for part in item["loc"] if not str(part).startswith(skipped))
        places.setdefault(place, []).append(item)
    inner = {place[:depth] for place in places for depth in range(len(place))}
    return {place: items for place, items in places.items() if place not in inner}


def _problem(errors: Sequence[Any]) -> str:
    """The part of a message that says what was found and what was wanted."""
    error = errors[0]
    if error["type"] == "missing":
        return "is missing; give it a value"
    if error["type"] == "string_pattern_mismatch":
        return f"got {found(error['input'])}; names are at most 64 letters, digits, - and _"
    return f"got {found(error['input'])}; {' or '.join(_wanted(error) for error in errors)}"


def _wanted(error: Any) -> str:
    match error["type"]:
        case "literal_error":
            names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"wanted {' or '.join(names)}" + plugin.nearest(str(error["input"]), names).replace(" Did", ". Did")
        case "dataclass_type":
            return "wanted a method's name, or a mapping with its name and options"
        case "dict_type":
            return "wanted a mapping, key: value"
        case "too_short" if error["ctx"]["min_length"] == 1:
            return "wanted at least one"
        case "string_too_short":
            return "wanted text that is not empty"
        case "tuple_type":
            return "wanted a list"
        case "string_type":
            return "wanted text" + ("; put it in quotes" if error["input"] is not None else "")
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            return str(error["msg"]).replace("Input should be", "it should be")
