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


class TableError(UserError):
    """A latency table that is malformed, of another identity or schema, or lacks rows."""


class UnsupportedOperatorError(UserError):
    """A network holds an operator that no builder knows."""
