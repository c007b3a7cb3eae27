"""What can go wrong that a user can mend. Every message reads: where, what was found, what was wanted, the remedy."""

import re


def redacted(text: str) -> str:
    """A text without the users, passwords and tokens that stand in its URLs, as in `s3://KEY:SECRET@host`."""
    return re.sub(r"""\b([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s/"'@]+@""", r"\1***@", text)


class LoriError(Exception):
    """Root of all errors raised on purpose by this package. As text, none of them has a secret of a URL."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(LoriError, ValueError):
    """A run's configuration asks for something unknown or impossible."""


class AdapterError(LoriError, ValueError):
    """An adapter file or an attached adapter is not what it should be."""


class JobError(LoriError, RuntimeError):
    """A job of a run failed, or may not go on."""


class Stopped(LoriError):
    """A run was ended by `lori stop`. The same run again goes on from there."""
