"""What can go wrong in a way a user can mend. It must not know where messages are shown."""

from __future__ import annotations


class ShoalError(Exception):
    """Base of every error with a message for the user: what is wrong, and what to do. `exit_code` is the process's."""

    exit_code = 1


class UsageError(ShoalError):
    """A wrong flag, file or combination."""

    exit_code = 2


class ModelError(ShoalError):
    """A checkpoint that cannot be run: unknown architecture, missing tensor, wrong shape, no tokenizer."""

    exit_code = 2


class RowError(ShoalError):
    """One input line cannot be run. `code` and `param` go into its error line."""

    def __init__(self, message: str, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class StateError(ShoalError):
    """The state folder belongs to another job, is locked, or cannot be resumed."""

    exit_code = 2


class EngineDied(ShoalError):
    """The engine process ended by itself."""
