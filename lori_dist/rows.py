"""Rows of a task as text: what the model reads, and what it learns to answer."""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lori_dist import config, plugin, tables
from lori_dist.errors import ConfigError
from lori_dist.tables import kind

DATE = "2024-07-26"
"""Date for chat templates that write today's date: the one that Llama 3's own templates use without a clock."""
LISTED = 20
"""Malformed rows whose mistake an error shows; of the others it gives the lines."""

Message = Mapping[str, str]
"""`role` and `content`."""
Text = tuple[str, str] | Sequence[Message]
"""Prompt and response, or messages of which the last is the response."""


def read(path: str, template: config.Template, *, where: str = "", labels: Sequence[str] | None = None) -> list[Text]:
    """The text of every row of a file, in its order; blank lines are skipped.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages. labels: all values that the field
    in the template's response may have.
    Raises ConfigError that names every row that cannot be used by its line: not JSON, no object, without a field that
    the template takes, with an empty response, or with another label.
    """
    prefix = f"{where}: " if where else ""
    render = _renderer(template, prefix, labels)
    texts, problems = list[Text](), list[tuple[int, ConfigError]]()
    try:
        for number, row in tables.read(path):
            try:
                texts.append(render(_usable(row)))
            except ConfigError as error:
                problems.append((number, error))
    except OSError as error:
        raise ConfigError(
            f"{prefix}{path} cannot be read ({error.strerror}); give the path of a JSON lines, CSV, TSV or Parquet file"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error
    if problems:
        raise ConfigError("\n".join(_listed(f"{prefix}{path}", problems, len(texts) + len(problems))))
    if not texts:
        raise ConfigError(f"{prefix}{path}: holds no rows; wanted one JSON object a line")
    return texts


def is_byte_level(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a tokenizer with these parts, as `tokenizer.json` has them, makes tokens of a text's bytes alone.

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
                read(path, task.template, where=f"tasks.{name}.{part}", labels=task.labels)
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


def responses(labels: Sequence[str], template: config.Template) -> tuple[str, ...]:
    """The response for each label: template.response with the label as its one field."""
    pieces = list(string.Formatter().parse(template.response))
    return tuple("".join(text + (label if name is not None else "") for text, name, _, _ in pieces) for label in labels)


def _renderer(
    template: config.Template, prefix: str, labels: Sequence[str] | None
) -> Callable[[Mapping[str, Any]], Text]:
    field = template.messages
    if field is not None:
        return lambda row: _messages(row, field)
    prompt, response = _filler(template.prompt, prefix), _filler(template.response, prefix)
    known = None if labels is None else frozenset(responses(labels, template))

    def render(row: Mapping[str, Any]) -> Text:
        found = prompt(row), _not_empty(response(row))
        if known is not None and found[1] not in known:
            wanted = responses(labels or (), template)
            raise ConfigError(
                f"its response is {found[1]!r}, which is not one of the labels; wanted one of "
                f"{', '.join(map(repr, wanted))}.{plugin.nearest(found[1], wanted)}"
            )
        return found

    return render


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
            if not isinstance(message[key], str):
                raise ConfigError(f"the {key} of message {number} of {field!r} is {kind(message[key])}; wanted text")
            tables.check_encodable(message[key], f"the {key} of message {number} of {field!r}")
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
        return "".join(literal + (tables.text(row, name) if name is not None else "") for literal, name, _, _ in pieces)

    return render


def _not_empty(response: str) -> str:
    if not response.strip():
        raise ConfigError("its response is empty; wanted text to learn")
    return response
