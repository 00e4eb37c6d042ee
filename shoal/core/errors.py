"""What can go wrong in a way a user can mend, and whose it is. It must not know where messages are shown."""

from __future__ import annotations

from typing import Literal

Fault = Literal["yours", "ours", "transient"]
"""Whose a row's failure is: the line's, so that the same line fails again; the engine's or its memory's; nobody's, for
it was over when the row ended."""

FAULTS: dict[str, Fault] = {
    # The line, as it stands, cannot be answered.
    **dict.fromkeys(
        ("invalid_json_line", "line_too_long", "malformed_row", "missing_field", "unknown_field", "missing_column",
         "invalid_method", "url_not_supported", "invalid_request", "not_supported", "invalid_constraint",
         "duplicate_custom_id", "context_length_exceeded", "empty_prompt", "invalid_token", "too_many_tasks",
         "no_chat_template", "chat_template", "unsupported_content", "invalid_unicode", "model_not_found",
         "request_missing", "row_timeout"),
        "yours",
    ),
    # It could be answered, here or with more memory.
    **dict.fromkeys(("kv_exhausted", "internal"), "ours"),
    # It was never answered, and may be at the next try.
    **dict.fromkeys(
        ("engine_died", "batch_expired", "batch_cancelled", "server_error", "no_reply", "bad_reply"), "transient"
    ),
}  # fmt: skip
"""Every error code of a row; what stands in an errors file, and what `shoal retry` runs again, follows from it."""


def fault_of(code: str) -> Fault:
    """Whose a failure with this code is. One that nobody has thought of is ours."""
    return FAULTS.get(code, "ours")


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
    """One input line cannot be run. `code`, one of FAULTS, and `param` go into its error line."""

    def __init__(self, message: str, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class StateError(ShoalError):
    """The state folder belongs to another job, is locked, or cannot be resumed."""

    exit_code = 2


class EngineDied(ShoalError):
    """The engine process ended by itself; where there are several, that of this number."""

    engine = 0
