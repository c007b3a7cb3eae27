"""Reading of YAML: YAML 1.2 as JSON has it, with bounds on the size of a file, and values that text can hold."""

import codecs
import itertools
import math
import os
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from lori_dist.config._words import found, unless
from lori_dist.errors import ConfigError


class _InPython(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser):
    """Events of a text for a PyYAML that was built without libyaml, which gives the same events faster."""

    def __init__(self, stream: str) -> None:
        yaml.reader.Reader.__init__(self, stream)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # PyYAML's name
        """Raises early for nested brackets: the scanner takes the square of their number."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


_Events: Any = vars(yaml.cyaml)["CParser"] if yaml.__with_libyaml__ else _InPython


class _Loader(
    yaml.composer.Composer,
    _Events,  # type: ignore[misc]  # one of two classes
    yaml.constructor.BaseConstructor,
    yaml.resolver.BaseResolver,
):
    """YAML 1.2 as JSON has it: text, numbers, true, false, null, lists and mappings; merge keys, and no other tags.

    Times such as 1:30, dates, 1_000, yes, no, on and off are text, which a key that wants a number or a switch reads.
    """

    def __init__(self, stream: str) -> None:
        _Events.__init__(self, stream)
        yaml.composer.Composer.__init__(self)
        yaml.constructor.BaseConstructor.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)
        self.repeated: list[tuple[list[int], str]] = []
        self._depth = self._number = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # PyYAML's name
        """Raises early for a text that is nested too deeply or has too many nodes, a key and its value being two."""
        self._depth += 1
        self._number += 1
        if self._depth > DEEPEST + 1:
            raise yaml.composer.ComposerError(None, None, TOO_DEEP, self.peek_event().start_mark)
        if self._number > 2 * MOST:
            raise _TooMany
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _TooMany(Exception):
    pass


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that _Loader would read as something else, such as 1e5."""


TAG = "tag:yaml.org,2002:"
FLOAT = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
for _kind_of_scalar, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:[0-9]+|0[0-9_]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(TAG + _kind_of_scalar, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(TAG + _kind_of_scalar, re.compile(_pattern), _first)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    written = loader.construct_scalar(typing.cast(yaml.ScalarNode, node))  # raises ConstructorError for other nodes
    kind = node.tag.removeprefix(TAG)
    match kind:
        case "str":
            return written
        case "null" if written in ("", "~") or written.lower() == "null":
            return None
        case "bool" if written.lower() in ("true", "false"):
            return written.lower() == "true"
        case "int" if re.fullmatch(r"[-+]?0[0-9_]*[1-9_][0-9_]*", written):
            problem = (
                f"{written} is base 8 to some readers of YAML; write it without the leading 0, or put text in quotes"
            )
        case "int" if re.fullmatch(r"[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", written):
            if len(written) <= LONGEST_NUMBER:
                return int(written, 0)
            problem = f"a number of {len(written)} digits; put text in quotes"
        case "float" if re.match(FLOAT, written):
            number = float(written.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isinf(number) or "inf" in written.lower():
                return number
            problem = f"{written[:LONGEST_NUMBER]} is larger than any float"
        case _:
            problem = f"{written[:LONGEST_NUMBER]!r} is not of the kind that its tag !!{kind} names; remove the tag"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "!!seq is the tag of a list; remove it", node.start_mark)
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    """Builds a mapping. Merge keys take what was built, not nodes: the same keys again and again take no more room than
    once."""
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "!!map is the tag of a mapping; remove it", node.start_mark)
    lines: dict[str, list[int]] = {}
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for key_node, item_node in node.value:
        lines.setdefault(str(key_node.value), []).append(key_node.start_mark.line + 1)
        item = loader.construct_object(item_node, deep=True)
        if key_node.tag == TAG + "merge":
            for mapping in item if isinstance(item, list) else [item]:
                if not isinstance(mapping, dict):
                    problem = "<< takes a mapping, or a list of mappings"
                    raise yaml.constructor.ConstructorError(None, None, problem, item_node.start_mark)
                merged = mapping | merged
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            problem = "a key is a list or a mapping; write text"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        own[key] = item
    loader.repeated += [(places, key) for key, places in lines.items() if len(places) > 1]
    return merged | own


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    tag = node.tag.replace(TAG, "!!")
    problem = f"the tag {tag} is not one of !!str, !!int, !!float, !!bool, !!null, !!seq and !!map; remove it"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _kind_of_scalar in ("str", "int", "float", "bool", "null"):
    _Loader.add_constructor(TAG + _kind_of_scalar, _scalar)
_Loader.add_constructor(TAG + "seq", _list)
_Loader.add_constructor(TAG + "map", _mapping)
_Loader.add_constructor(None, _refuse_tag)  # every other tag

LARGEST = 2**20
"""Bytes that a file may have."""
MOST, DEEPEST, LONGEST_NUMBER = 25_000, 64, 100
"""Number of values that a configuration may have, their nesting, and characters of a number."""
TOO_DEEP = f"it is nested more than {DEEPEST} deep; write it flat"


def read(path: str | Path) -> Any:
    """Returns the content of a YAML file. Raises ConfigError."""
    tree, problems = parse(text_of(path), str(path))
    return unless(problems, tree)


def value(text: str, where: str) -> Any:
    """Returns the value of a text from the command line, read as values of a configuration are. Raises ConfigError."""
    tree, problems = parse(text, where)
    unusable: dict[Place, str] = {}
    tree = usable(tree, (), unusable)
    return unless([*problems, *(f"{where}: {problem}" for problem in unusable.values())], tree)


def write(tree: Any) -> str:
    """Returns YAML that reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def text_of(path: str | Path) -> str:
    """Reads a file, or a pipe that somebody writes to, with a bound on its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            os.set_blocking(descriptor, True)
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error


def parse(text: str, source: str) -> tuple[Any, list[str]]:
    """Returns the content of a YAML text, and the keys that it gives more than once."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except _TooMany:
        raise ConfigError(_too_many(source)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: is not valid YAML: {where}{what}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # control characters; escapes that are not characters
        raise ConfigError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error
    return unshared(tree, source), [
        f"{source}: {key} is given in lines {' and '.join(map(str, lines))}; keep one"
        for lines, key in sorted(loader.repeated)
    ]


def _too_many(source: str) -> str:
    return f"{source}: has more than {MOST:,} values, counting what aliases repeat; write fewer"


Place = tuple[str, ...]
"""The place of a value: the keys that lead to it."""


def unshared(tree: Any, source: str) -> Any:
    """A copy in which everything that YAML's aliases repeat stands as often. Raises ConfigError for a tree that is too
    large."""
    number = itertools.count(1)

    def copied(value: Any, depth: int) -> Any:
        if next(number) > MOST:
            raise ConfigError(_too_many(source))
        if depth > DEEPEST:
            raise ConfigError(f"{source}: is nested more than {DEEPEST} deep; write it flat")
        if isinstance(value, dict):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        return [copied(item, depth + 1) for item in value] if isinstance(value, (list, tuple)) else value

    return copied(tree, 0)


def usable(value: Any, place: Place, problems: dict[Place, str]) -> Any:
    """The tree with the keys that are text. Adds to `problems` the keys that are not, and unusable texts and
    numbers."""
    if isinstance(value, dict):
        made = {}
        for key, item in value.items():
            below = (*place, key if isinstance(key, str) and not UNUSABLE.search(key) else found(key))
            if below[-1] is not key:
                wrong = "has a character that text cannot have" if isinstance(key, str) else "is not a text"
                problems[below] = f"the key {wrong}; {'remove it' if isinstance(key, str) else 'put it in quotes'}"
            made[below[-1]] = usable(item, below, problems)
        return made
    if isinstance(value, list):
        return [usable(item, (*place, str(index)), problems) for index, item in enumerate(value)]
    if isinstance(value, str) and UNUSABLE.search(value):
        problems[place] = f"{found(value)} has a character that text cannot have; remove it"
    elif isinstance(value, int) and value.bit_length() > 64:
        problems[place] = "got a number of more than 64 bits; write a smaller one"
    return value


UNUSABLE = re.compile(r"[\0\ud800-\udfff]")
"""Characters that no file name has (NUL) or that no file of text has: halves of characters, as of `"\\ud800"`."""
