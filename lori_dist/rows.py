"""Rows of a task as text: the prompt that the model reads, and the response that it learns."""

import contextlib
import itertools
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lori_dist import config, plugin, tables
from lori_dist.errors import ConfigError
from lori_dist.tables import kind

DATE = "2024-07-26"
"""Date for chat templates that write today's date: the one that Llama 3's own templates use without a clock."""
LISTED = 20
"""Malformed rows of a file whose mistake an error shows; of the others it gives the lines."""

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
"""Prompts of the Alpaca data, with and without an input."""
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Who speaks in ShareGPT rows -> role."""

Message = Mapping[str, Any]
"""`role` and `content`, which is text, and what else the chat template reads, such as `tool_calls`."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages of which the last is an assistant's."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of what the assistant may call."""


Text = tuple[str, str] | Chat
"""Prompt and response, or a chat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file of rows, and how they read."""

    path: str
    template: config.Template
    where: str = ""
    """The file's place in the configuration (`tasks.sst2.train`), for messages."""
    labels: tuple[str, ...] | None = None
    """All values that the field in the template's response may have."""

    @property
    def prefix(self) -> str:
        """The beginning of messages."""
        return f"{self.where}: " if self.where else ""

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Inside, errors of reading the file are ConfigErrors that name it and its place."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.prefix}{self.path} cannot be read ({error.strerror}); give the path of a JSON lines, CSV, TSV "
                "or Parquet file"
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{self.prefix}{error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The rows of a piece as text."""

    texts: list[Text]
    numbers: list[int]
    """The line of each text, or the number of its row."""
    problems: list[tuple[int, str]]
    """What is wrong with the other rows."""
    has_tools: bool
    """Whether any row has the field that template.tools names, if that is set."""


class Renderer:
    """Makes text of the rows of a source. Raises ConfigError for a template that cannot be used."""

    def __init__(self, source: Source) -> None:
        has_all_keys = tables.is_hub(source.path) or tables.ending(source.path) == ".parquet"
        self._render = _renderer(source.template, source.prefix, source.labels, has_all_keys=has_all_keys)
        self._tools = source.template.tools

    def __call__(self, piece: Iterable[tables.Item]) -> Texts:
        found = Texts(texts=[], numbers=[], problems=[], has_tools=self._tools is None)
        has_tools = found.has_tools
        for number, row in tables.parsed(piece):
            has_tools = has_tools or (isinstance(row, Mapping) and self._tools in row)
            try:
                found.texts.append(self._render(_usable(row)))
                found.numbers.append(number)
            except ConfigError as error:
                found.problems.append((number, str(error)))
        return replace(found, has_tools=has_tools)


class Tally:
    """What is wrong with the rows of a source, as its pieces come."""

    def __init__(self, source: Source) -> None:
        self.source, self.num_rows = source, 0
        self._num_bad, self._has_tools = 0, False
        self._listed: list[tuple[int, str]] = []
        self._others: list[tuple[int, int]] = []

    def add(self, num_good: int, problems: Sequence[tuple[int, str]], *, has_tools: bool) -> None:
        """Takes up a piece."""
        self.num_rows += num_good + len(problems)
        self._num_bad += len(problems)
        self._has_tools = self._has_tools or has_tools
        room = LISTED - len(self._listed)
        self._listed += problems[:room]
        for number, _ in problems[room:]:
            first, last = self._others[-1] if self._others else (0, -1)
            if number in (last, last + 1):  # a line may hold several rows
                self._others[-1] = first, number
            else:
                self._others.append((number, number))

    def check(self) -> None:
        """Raises ConfigError that names every row that cannot be used by its line, or what the file lacks."""
        where = f"{self.source.prefix}{self.source.path}"
        if self._num_bad:
            lines = [f"{where}:{number}: {problem}" for number, problem in self._listed]
            if self._others:
                ranges = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in self._others)
                more = self._num_bad - len(self._listed)
                lines.append(f"{where}: {more} more of {self.num_rows} rows cannot be used, in lines {ranges}")
            raise ConfigError("\n".join(lines))
        if not self.num_rows:
            raise ConfigError(f"{where}: holds no rows; wanted one JSON object a line")
        if not self._has_tools:
            tools = self.source.template.tools
            raise ConfigError(f"{where}: no row has the field {tools!r}, which template.tools names")


def pieces(source: Source) -> Iterator[tables.Piece]:
    """Yields the rows of a source in pieces. Raises ConfigError for a file that cannot be read."""
    with source.naming():
        yield from tables.pieces(source.path)


def texts_of(source: Source) -> Iterator[list[Text]]:
    """Yields the text of the rows of a source, piece by piece.

    Raises ConfigError at its end, that names every row that cannot be used by its line: not JSON, no object, without a
    field that the template takes, with an empty response, or with another label.
    """
    render, tally = Renderer(source), Tally(source)
    for piece in pieces(source):
        found = render(piece)
        tally.add(len(found.texts), found.problems, has_tools=found.has_tools)
        yield found.texts
    tally.check()


def read(path: str, template: config.Template, *, where: str = "", labels: Sequence[str] | None = None) -> list[Text]:
    """The text of every row of a file, in its order; blank lines are skipped. Arguments as in `Source`, errors as in
    `texts_of`."""
    source = Source(path=path, template=template, where=where, labels=None if labels is None else tuple(labels))
    return [*itertools.chain.from_iterable(texts_of(source))]


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


def _usable(row: Mapping[str, Any] | ConfigError) -> Mapping[str, Any]:
    if isinstance(row, ConfigError):
        raise row
    return row


def responses(labels: Sequence[str], template: config.Template) -> tuple[str, ...]:
    """The response for each label: template.response with the label as its one field."""
    pieces = list(string.Formatter().parse(template.response))
    return tuple("".join(text + (label if name is not None else "") for text, name, _, _ in pieces) for label in labels)


def _renderer(
    template: config.Template, prefix: str, labels: Sequence[str] | None, *, has_all_keys: bool
) -> Callable[[Mapping[str, Any]], Text]:
    """has_all_keys: whether the file gives every object the keys of all others, with null for those it lacks."""
    field = template.chat
    if field is not None:
        return lambda row: _chat(_without_nulls(row) if has_all_keys else row, field, template)
    if template.layout == "alpaca":
        return _alpaca
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


def _alpaca(row: Mapping[str, Any]) -> Text:
    with_input, without = ALPACA
    is_missing = row.get("input") is None or isinstance(row["input"], tables.Missing)
    given = "" if is_missing else tables.text(row, "input")
    instruction, output = tables.text(row, "instruction"), _not_empty(tables.text(row, "output"))
    form = with_input if given.strip() else without
    return form.format(instruction=instruction, input=given), output


# --- chats -----------------------------------------------------------------------------------------------------------


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _chat(row: Mapping[str, Any], field: str, template: config.Template) -> Chat:
    if field not in row:
        raise ConfigError(f"has no field {field!r}; there are {', '.join(sorted(row)) or 'none'}")
    given = row[field]
    if not isinstance(given, list) or len(given) < 2:
        found = f"a list of {len(given)}" if isinstance(given, list) else kind(given)
        raise ConfigError(f"field {field!r} is {found}; wanted a list of two or more messages")
    is_sharegpt = template.layout == "sharegpt"
    messages = [
        _message(message, f"message {number} of {field!r}", is_sharegpt=is_sharegpt)
        for number, message in enumerate(given, start=1)
    ]
    if is_sharegpt and isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if messages[-1]["role"] != "assistant":
        raise ConfigError(f"the last message of {field!r} is of {messages[-1]['role']!r}; wanted one of 'assistant'")
    if "tool_calls" not in messages[-1]:
        _not_empty(messages[-1]["content"])
    return Chat(messages, None if template.tools is None else _tools(row, template.tools))


def _message(message: Any, where: str, *, is_sharegpt: bool) -> Message:
    """A message with a role and with content that is text: "" where an assistant calls tools and says nothing."""
    if is_sharegpt:
        message = _of_sharegpt(message, where)
    has_calls = isinstance(message, dict) and bool(message.get("tool_calls"))
    if not isinstance(message, dict) or not {"role", "content"} - ({"content"} if has_calls else set()) <= set(message):
        raise ConfigError(f"{where} has no role and content; wanted both")
    content = message.get("content")
    if content is None and has_calls:
        content = ""
    elif isinstance(content, list):
        content = "".join(_part(part, f"part {number} of {where}") for number, part in enumerate(content, start=1))
    for key, value in (("role", message["role"]), ("content", content)):
        if not isinstance(value, str):
            raise ConfigError(f"the {key} of {where} is {kind(value)}; wanted text")
        tables.check_encodable(value, f"the {key} of {where}")
    made = {key: value for key, value in message.items() if value is not None} | {"content": content}
    if has_calls:
        made["tool_calls"] = _calls(message["tool_calls"], where)
    else:
        made.pop("tool_calls", None)
    return made


def _part(part: Any, where: str) -> str:
    """The text of a part of a message's content, as {"type": "text", "text": ...} has it."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        found = repr(part["type"]) if isinstance(part, dict) and part.get("type", "text") != "text" else kind(part)
        raise ConfigError(f"{where} is {found}; wanted a part of type 'text' with its text")
    return text


def _calls(calls: Any, where: str) -> list[Mapping[str, Any]]:
    """Calls of tools, their arguments as objects: chat templates write these as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConfigError(f"the tool_calls of {where} are {kind(calls)}; wanted a list of objects")
    made = list[Mapping[str, Any]]()
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(
                f"a call in the tool_calls of {where} has no name of a function; wanted name and arguments"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"the arguments of {function['name']!r} in {where}")
        function = {**function, "arguments": arguments}
        made.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return made


def _of_sharegpt(message: Any, where: str) -> Any:
    """A message of ShareGPT, `from` and `value`, with role and content."""
    if not isinstance(message, dict) or not {"from", "value"} <= set(message):
        raise ConfigError(f"{where} has no from and value; wanted both")
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        found = repr(speaker) if isinstance(speaker, str) else kind(speaker)
        raise ConfigError(f"{where} is from {found}; wanted one of {', '.join(ROLES)}")
    if speaker != "function_call":
        return {"role": ROLES[speaker], "content": message["value"]}
    calls = (
        _parsed(message["value"], f"the value of {where}") if isinstance(message["value"], str) else message["value"]
    )
    return {"role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _tools(row: Mapping[str, Any], field: str) -> Sequence[Mapping[str, Any]] | None:
    """The schemas in a field, which may hold them as JSON text; None for a row without any."""
    tools = row.get(field)
    if isinstance(tools, str):
        tools = _parsed(tools, f"field {field!r}") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(
            f"field {field!r} is {kind(tools)}; wanted a list of tools, each an object with its JSON schema"
        )
    return tools


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is text that is not JSON ({error}); wanted JSON") from error


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
