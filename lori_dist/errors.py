"""What can go wrong that a user can mend. Every message reads: where, what was found, what was wanted, the remedy."""


class LoriError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(LoriError, ValueError):
    """A run's configuration asks for something unknown or impossible."""


class AdapterError(LoriError, ValueError):
    """An adapter file or an attached adapter is not what it should be."""


class JobError(LoriError, RuntimeError):
    """A job of a run failed, or may not go on."""


class Stopped(LoriError):
    """A run was ended by `lori stop`. The same run again goes on from there."""
