"""Rows of a task as text: what the model reads, and what it learns to answer."""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lori_dist import config, tables
from lori_dist.errors import ConfigError
from lori_dist.tables import kind

LISTED = 20
"""Malformed rows whose mistake an error shows; of the others it gives the lines."""

Message = Mapping[str, str]
"""`role` and `content`."""
Text = tuple[str, str] | Sequence[Message]
"""Prompt and response, or messages of which the last is the response."""


def read(path: str, template: config.Template, *, where: str = "") -> list[Text]:
    """The text of every row of a file, in its order; blank lines are skipped.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages.
    Raises ConfigError that names every row that cannot be used by its line: not JSON, no object, without a field that
    the template takes, or with an empty response.
    """
    prefix = f"{where}: " if where else ""
    render = _renderer(template, prefix)
    texts, problems = list[Text](), list[tuple[int, ConfigError]]()
    try:
        for number, row in tables.read(path):
            try:
                texts.append(render(_usable(row)))
            except ConfigError as error:
                problems.append((number, error))
    except OSError as error:
        raise ConfigError(
            f"{prefix}{path} cannot be read ({error.strerror}); give the path of a JSON lines, CSV or Parquet file"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error
    if problems:
        raise ConfigError("\n".join(_listed(f"{prefix}{path}", problems, len(texts) + len(problems))))
    if not texts:
        raise ConfigError(f"{prefix}{path}: holds no rows; wanted one JSON object a line")
    return texts


def is_byte_level(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a tokenizer with these parts, as `tokenizer.json` has them, makes tokens of a text's bytes and nothing else.

    It then puts no blank before a text and leaves nothing out, so that the tokens of two texts, one after the other,
    are those of a text. Of other tokenizers this is not known.
    """
    normalizers, pieces = _flat(normalizer, "normalizers"), _flat(pre_tokenizer, "pretokenizers")
    levels = [part for part in (*normalizers, *pieces) if part.get("type") == "ByteLevel"]
    return (
        bool(levels)
        and not any(part.get("add_prefix_space") for part in levels)
        and all(part.get("type") in ("ByteLevel", "NFC", "NFD", "NFKC", "NFKD", "Lowercase") for part in normalizers)
        and all(part.get("type") in ("ByteLevel", "Split", "Digits", "Punctuation") for part in pieces)
        and not any(part.get("behavior") == "Removed" for part in pieces)
    )


def _flat(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [piece for inner in part.get(key, []) for piece in _flat(inner, key)]


def check(run: config.Run) -> None:
    """Raises ConfigError with every row of every file of the run that cannot be used, before anything is trained."""
    problems = []
    for name, task in run.tasks.items():
        for part, path in config.files(task):
            try:
                read(path, task.template, where=f"tasks.{name}.{part}")
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _listed(where: str, problems: Sequence[tuple[int, ConfigError]], num_rows: int) -> Iterator[str]:
    yield from (f"{where}:{number}: {problem}" for number, problem in problems[:LISTED])
    if others := [number for number, _ in problems[LISTED:]]:
        lines = ", ".join(_ranges([*dict.fromkeys(others)]))  # a line may hold several rows
        yield f"{where}: {len(others)} more of {num_rows} rows cannot be used, in lines {lines}"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Numbers that follow each other as first-last."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield f"{first}-{last}" if last > first else str(first)
            first = number
        last = number
    yield f"{first}-{last}" if last > first else str(first)


def _usable(row: Mapping[str, Any] | ConfigError) -> Mapping[str, Any]:
    if isinstance(row, ConfigError):
        raise row
    return row


def _renderer(template: config.Template, prefix: str) -> Callable[[Mapping[str, Any]], Text]:
    field = template.messages
    if field is not None:
        return lambda row: _messages(row, field)
    prompt, response = _filler(template.prompt, prefix), _filler(template.response, prefix)
    return lambda row: (prompt(row), _not_empty(response(row)))


def _messages(row: Mapping[str, Any], field: str) -> Sequence[Message]:
    if field not in row:
        raise ConfigError(f"has no field {field!r}; there are {', '.join(sorted(row)) or 'none'}")
    messages = row[field]
    if not isinstance(messages, list) or len(messages) < 2:
        found = f"a list of {len(messages)}" if isinstance(messages, list) else kind(messages)
        raise ConfigError(f"field {field!r} is {found}; wanted a list of two or more messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ConfigError(f"message {number} of {field!r} has no role and content; wanted both")
        for key in ("role", "content"):
            _text(message, key)
    if messages[-1]["role"] != "assistant":
        raise ConfigError(f"the last message of {field!r} is of {messages[-1]['role']!r}; wanted one of 'assistant'")
    _not_empty(messages[-1]["content"])
    return messages


def _filler(template: str, prefix: str) -> Callable[[Mapping[str, Any]], str]:
    """Only `{field}`: nothing of a row is looked into or formatted, so a file of rows cannot do anything."""
    pieces = list(string.Formatter().parse(template))
    for _, name, form, conversion in pieces:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ConfigError(f"{prefix}{template!r} has more than the name of a field in braces; write {{text}}")

    def render(row: Mapping[str, Any]) -> str:
        return "".join(literal + (_text(row, name) if name is not None else "") for literal, name, _, _ in pieces)

    return render


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ConfigError(f"has no field {name!r}; there are {', '.join(sorted(row)) or 'none'}")
    value = row[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):  # a file without text, as Parquet, has numbers with a point
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"field {name!r} is {kind(value)}; wanted text or a number")
    if not _encodable(value):
        raise ConfigError(f"field {name!r} has half of a surrogate pair; wanted Unicode text")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_empty(response: str) -> str:
    if not response.strip():
        raise ConfigError("its response is empty; wanted text to learn")
    return response
