"""What a configuration may hold: as a JSON schema for editors, as YAML for readers. Both are made from the sections."""

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.json_schema import GenerateJsonSchema

from lori_dist import config, plugin
from lori_dist.config import Choice, Methods

FILE = Path(__file__).parent / "config.schema.json"
"""The schema as it ships, which configurations name in their first line."""
WIDTH, COLUMN = 120, 32
"""Of the YAML: its longest line, and where comments begin."""


class _Generator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """Editors show the key itself, and its description."""
        return False


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a run's configuration. Every key has a description."""
    adapter = pydantic.TypeAdapter(config.Run)
    schema = adapter.json_schema(schema_generator=_Generator)
    definitions = schema["$defs"]
    del definitions["Choice"]
    sections = {"Run": schema, **definitions}
    for section in _sections(config.Run):
        for name, hint in typing.get_type_hints(section, include_extras=True).items():
            properties = sections[section.__name__]["properties"]
            key = properties[name]
            if is_dataclass(hint):  # pydantic leaves out what the section's own description says
                key.setdefault("description", sections[typing.cast(type, hint).__name__]["description"])
            key["description"] = " ".join(key["description"].split())
            if "patternProperties" in key:
                key["additionalProperties"] = False
            for methods in getattr(hint, "__metadata__", ()):
                if isinstance(methods, Methods):
                    key.pop("$ref", None)
                    key["anyOf"] = [*_methods(methods), *([{"type": "null"}] if "default" in key else [])]
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "Configuration of a lori_dist run"}


def text() -> str:
    """Returns the JSON schema as it is in FILE."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _sections(section: Any) -> Iterator[Any]:
    """A section and all that are below it."""
    yield section
    for hint in typing.get_type_hints(section).values():
        for inner in (hint, *typing.get_args(hint)):
            if is_dataclass(inner) and inner is not Choice:
                yield from _sections(inner)


def _methods(methods: Methods) -> Iterator[dict[str, Any]]:
    """A method's name alone, or in a mapping with its options; of one's own method, in a module, any options."""
    names = plugin.names(methods.folder)
    yield {"enum": list(names)}
    for name in names:
        method = plugin.find(methods.folder, name, methods.role, methods.folder)
        options = {
            key: {**pydantic.TypeAdapter(option.annotation).json_schema(), "default": option.default}
            for key, option in method.options.items()
        }
        properties = {"name": {"const": name}, **options}
        yield {
            "type": "object",
            "description": method.summary,
            "properties": properties,
            "required": ["name"],
            "additionalProperties": False,
        }
    own = {"type": "string", "pattern": r"\.", "description": "A module of your own, as package.module."}
    yield own
    yield {"type": "object", "properties": {"name": own}, "required": ["name"]}


# --- YAML ------------------------------------------------------------------------------------------------------------


def as_yaml() -> str:
    """Returns all keys with their defaults and descriptions as YAML; `...` stands for what has no default."""
    sections = json_schema()
    described = {"Run": sections, **sections["$defs"]}
    return "\n".join(_lines(config.Run, described, "")) + "\n"


def _lines(section: Any, described: dict[str, Any], indent: str) -> Iterator[str]:
    hints = typing.get_type_hints(section)
    for item in fields(section):
        text = described[section.__name__]["properties"][item.name]["description"]
        if unnamed := [str(choice) for choice in _choices(hints[item.name]) if str(choice) not in text]:
            text = f"{text.removesuffix('.')}: {', '.join(unnamed)}."
        inner = [part for part in (hints[item.name], *typing.get_args(hints[item.name])) if is_dataclass(part)]
        below = inner[0] if inner and inner[0] is not Choice else None
        is_optional = isinstance(hints[item.name], types.UnionType)
        value = "" if below is not None and not is_optional else _default(item)
        yield from _commented(f"{indent}{item.name}:{f' {value}' if value else ''}", text)
        if below is None:
            continue
        if typing.get_origin(hints[item.name]) is dict:
            yield from _commented(f"{indent}  ...:", "its name")
            yield from _lines(below, described, f"{indent}    ")
        elif is_optional:
            yield f"{indent}# {item.name}:"
            yield from (f"{indent}#   {line}" for line in _lines(below, described, ""))
        else:
            yield from _lines(below, described, f"{indent}  ")


def _choices(hint: Any) -> Iterator[Any]:
    """The values of a Literal, wherever in an annotation it stands."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        yield from (choice for inner in typing.get_args(hint) for choice in _choices(inner))


def _default(item: "Field[Any]") -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "..."
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    value = default.name if isinstance(default, Choice) else list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(value, default_flow_style=True, width=WIDTH).removesuffix("\n...\n").strip()


def _commented(line: str, text: str) -> Iterator[str]:
    """The comment stands beside the line, or above it where it is too long."""
    if len(beside := f"{line:<{COLUMN - 1}} # {text}") <= WIDTH:
        yield beside
        return
    indent = line[: len(line) - len(line.lstrip())]
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    yield line
