"""The ends of verbs: the message and the exit code of an error, and the reaction to SIGTERM."""

import argparse
import functools
import logging
import traceback
from collections.abc import Callable

from lori_dist.errors import ConfigError, LoriError, Stopped

log = logging.getLogger(__name__)

Run = Callable[[argparse.Namespace], int | None]
"""Runs a verb. Returns the exit code if that is not 0."""


def message_of(error: BaseException, verbose: bool) -> tuple[str, int] | None:
    """The message and the exit code of an error that is raised on purpose; None for any other."""
    if isinstance(error, LoriError):
        message = "".join(traceback.format_exception(error)).rstrip() if verbose else str(error)
        return message, 2 if isinstance(error, ConfigError) else 3 if isinstance(error, Stopped) else 1
    if isinstance(error, OSError):  # a folder that cannot be written, a full disk
        log.debug("", exc_info=error)
        return f"{error.filename or type(error).__name__}: {error.strerror or error}; check it and try again", 1
    return ("Interrupted.", 130) if isinstance(error, KeyboardInterrupt) else None


def ended_by_sigterm(run: Run) -> Run:
    """Wraps a verb so that SIGTERM ends it with a line and its own exit code, from its first import on."""

    @functools.wraps(run)
    def called(arguments: argparse.Namespace) -> int | None:
        if getattr(arguments, "address", None) is not None:  # it only follows a job, which does not end with it
            return run(arguments)
        from lori_dist.training import preemption

        with preemption.raised_by_sigterm(""):
            return run(arguments)

    return called
