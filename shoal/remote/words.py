"""What goes to a server and what comes back: an engine's request and output, with the bodies of both.

It must not know HTTP, nor how often a call is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.types import Output, Request


@dataclass(frozen=True, slots=True)
class Call(Request):
    """A request as a server is asked. Its `prompt` only says what it shares with others: two bytes of text a token."""

    url: str = ""  # as the row gives it: /v1/chat/completions
    body: bytes = b""
    answers: int = 1  # choices, or vectors, that a whole reply has
    blamed: bool = False  # it has failed while others were answered, in an earlier run


@dataclass(slots=True)
class Reply(Output):
    """How a call ended: with a body, or with an error of this code, of the server's `status`."""

    body: str = ""  # JSON on one line
    usage: tuple[int, int] = (0, 0)  # prompt and output tokens, as the server counts them
    code: str = ""
