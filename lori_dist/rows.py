"""Rows of a task as text: the prompt that the model reads, and the response that it learns."""

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lori_dist import config, plugin, tables
from lori_dist.errors import ConfigError
from lori_dist.tables import kind

DATE = "2024-07-26"
"""Date for chat templates that write today's date: the one that Llama 3's own templates use without a clock."""
LISTED = 20
"""Malformed rows whose mistake an error shows; of the others it gives the lines."""

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


def read(path: str, template: config.Template, *, where: str = "", labels: Sequence[str] | None = None) -> list[Text]:
    """The text of every row of a file, in its order; blank lines are skipped.

    where: the file's place in the configuration (`tasks.sst2.train`), for messages. labels: all values that the field
    in the template's response may have.
    Raises ConfigError that names every row that cannot be used by its line: not JSON, no object, without a field that
    the template takes, with an empty response, or with another label.
    """
    prefix = f"{where}: " if where else ""
    render = _renderer(template, prefix, labels, has_all_keys=tables.is_hub(path) or tables.ending(path) == ".parquet")
    texts, problems, has_tools = list[Text](), list[tuple[int, ConfigError]](), template.tools is None
    try:
        for number, row in tables.read(path):
            has_tools = has_tools or (isinstance(row, Mapping) and template.tools in row)
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
    if not has_tools:
        raise ConfigError(f"{prefix}{path}: no row has the field {template.tools!r}, which template.tools names")
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
