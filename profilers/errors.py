"""Errors a user can cause or meet. Each is one line that says what, which value, and what to type next."""

from __future__ import annotations


class UserError(Exception):
    """Bad usage or bad input. `exit_code` is what the command line ends with."""

    exit_code = 2


class FailedError(UserError):
    """The work could not be done although the input was right: disk full, nothing writable."""

    exit_code = 1


class DeviceError(UserError):
    """The device is not there, lacks its runtime, or is too unstable to be timed."""

    exit_code = 3


class UnsteadyError(DeviceError):
    """Samples of one timing that spread too far: a later one may be better. what: they and the limit."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the machine is too unstable: {what}; stop other programs and run the same command again")
        self.what = what


class TableError(UserError):
    """A latency table that is malformed, of another identity or schema, or lacks rows."""


class UnsupportedOperatorError(UserError):
    """A network holds an operator that no builder knows."""
