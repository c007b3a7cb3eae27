"""Errors that a user can correct. Every message reads: where, what was found, what was wanted, the remedy."""

import io
import json
import logging
import os
import re
import sys

SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
"""Words in the name of a variable whose value must not be shown."""
PLACE = re.compile(r"_(PATH|FILE|DIR|HOME)$", re.IGNORECASE)
"""The end of the name of one that only says where it is."""
SHORTEST, LONG = 6, 8
"""Characters of a secret. Shorter values, such as `true`, stand in many texts; and below the second, a value is left
out where it stands by itself, not as a part of a word."""


def is_secret(variable: str) -> bool:
    """Whether the value of a variable of the environment looks like a secret, by its name."""
    return SECRET.search(variable) is not None and PLACE.search(variable) is None


def redacted(text: str) -> str:
    """A text without the users, passwords and tokens that stand in its URLs, as in `s3://KEY:SECRET@host`, and without
    the secrets of this process's environment."""
    values = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}
    values |= {json.dumps(value, ensure_ascii=False)[1:-1] for value in values}  # as they stand in JSON
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, "***") if len(value) >= LONG else _without_word(text, value)
    return re.sub(r"""\b([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s/"'@]+@""", r"\1***@", text)


def _without_word(text: str, word: str) -> str:
    if word not in text:
        return text
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "***", text)


class Redacting(logging.Formatter):
    """Leaves out secrets, those in tracebacks as well."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def print_anything() -> None:
    """Lets this process print any text: what its terminal or log file has no character for appears escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class LoriError(Exception):
    """Root of all errors raised on purpose by this package. As text, none of them has a secret."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(LoriError, ValueError):
    """A run's configuration asks for something unknown or impossible."""


class AdapterError(LoriError, ValueError):
    """An adapter file or an attached adapter is not what it should be."""


class JobError(LoriError, RuntimeError):
    """A job of a run failed, or may not go on."""


class Stopped(LoriError):
    """A run was ended by `lori stop`. The same run again resumes from there."""


class Preempted(Stopped):
    """A job was asked to end, by a signal or a time limit, and ended after saving. The same command resumes from
    there."""
