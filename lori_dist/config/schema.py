"""The configuration's schema: as JSON schema for editors, as YAML for readers. Both are made from the sections."""

import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.json_schema import GenerateJsonSchema

from lori_dist import plugin
from lori_dist.config.check import default_of, keys
from lori_dist.config.kinds import Choice, Methods
from lori_dist.config.run import Run

FILE = Path(__file__).parents[1] / "config.schema.json"
"""The shipped schema, which configurations name in their first line."""
WIDTH, COLUMN = 120, 32
"""Longest line of the YAML, and the column of its comments."""


class _Generator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leaves titles out: editors show the key itself, and its description."""
        return False


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a run's configuration. Every key has a description.

    `x-fingerprint` says of a key, and of all below it, that another value does not by itself make finished jobs count
    as not done: its value is part of their fingerprints `if set`, never, or what is `derived` from it is.
    """
    adapter = pydantic.TypeAdapter(Run)
    schema = adapter.json_schema(schema_generator=_Generator)
    definitions = schema["$defs"]
    del definitions["Choice"]
    sections = {"Run": schema, **definitions}
    for section in _sections(Run):
        for name, stated in keys(section).items():
            key = sections[section.__name__]["properties"][name]
            if stated.section is not None:  # pydantic leaves out what the section's own description says
                key.setdefault("description", sections[stated.section.__name__]["description"])
            key["description"] = " ".join(key["description"].split())
            if "patternProperties" in key:
                key["additionalProperties"] = False
            if stated.methods is not None:
                key.pop("$ref", None)
                key["anyOf"] = [*_methods(stated.methods), *([{"type": "null"}] if "default" in key else [])]
            if stated.fingerprint is not None:
                key["x-fingerprint"] = stated.fingerprint.value
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "Configuration of a lori_dist run"}


def text() -> str:
    """Returns the JSON schema as it is in FILE."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _sections(section: Any) -> Iterator[Any]:
    """Yields a section and all sections below it."""
    yield section
    for key in keys(section).values():
        if below := key.section or key.sections:
            yield from _sections(below)


def _methods(methods: Methods) -> Iterator[dict[str, Any]]:
    """Yields the forms of a method: its name alone, or a mapping with its options; a method of the user's own module
    takes any options."""
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
    """Returns all keys with their defaults and descriptions as YAML; `...` stands for a value without a default."""
    sections = json_schema()
    described = {"Run": sections, **sections["$defs"]}
    return "\n".join(_lines(Run, described, "")) + "\n"


def _lines(section: Any, described: dict[str, Any], indent: str) -> Iterator[str]:
    for item in fields(section):
        key = keys(section)[item.name]
        text = described[section.__name__]["properties"][item.name]["description"]
        if unnamed := [str(choice) for choice in _choices(key.hint) if str(choice) not in text]:
            text = f"{text.removesuffix('.')}: {', '.join(unnamed)}."
        has_sections = key.section is not None or key.sections is not None
        value = "" if has_sections and not key.is_optional else _default(item)
        yield from _commented(f"{indent}{item.name}:{f' {value}' if value else ''}", text)
        if key.sections is not None:
            yield from _commented(f"{indent}  ...:", "its name")
            yield from _lines(key.sections, described, f"{indent}    ")
        elif key.is_optional:
            yield f"{indent}# {item.name}:"
            yield from (f"{indent}#   {line}" for line in _lines(key.section, described, ""))
        elif key.section is not None:
            yield from _lines(key.section, described, f"{indent}  ")


def _choices(hint: Any) -> Iterator[Any]:
    """Yields the values of a Literal, wherever it stands in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        yield from (choice for inner in typing.get_args(hint) for choice in _choices(inner))


def _default(item: "Field[Any]") -> str:
    if (default := default_of(item)) is MISSING:
        return "..."
    value = default.name if isinstance(default, Choice) else list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(value, default_flow_style=True, width=WIDTH).removesuffix("\n...\n").strip()


def _commented(line: str, text: str) -> Iterator[str]:
    """Yields a line with its comment beside it, or above it if it is too long."""
    if len(beside := f"{line:<{COLUMN - 1}} # {text}") <= WIDTH:
        yield beside
        return
    indent = line[: len(line) - len(line.lstrip())]
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    yield line
