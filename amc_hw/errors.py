"""Errors a user can cause or meet, with their exit codes; those of the measuring side included."""

from __future__ import annotations

from profilers.errors import DeviceError, FailedError, TableError, UnsupportedOperatorError, UserError

__all__ = [
    "BudgetError",
    "DeviceError",
    "FailedError",
    "TableError",
    "UnsupportedOperatorError",
    "UserError",
]


class BudgetError(UserError):
    """A budget that nothing reaches, or that no measured candidate met."""

    exit_code = 4
