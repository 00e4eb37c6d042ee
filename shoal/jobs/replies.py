"""What comes back from a server: a reply as a row's one sample, and as a line of the output.

It must not know how a reply was got. A row's reply is passed on as the server wrote it, on one line.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Finish, Output, Request, TokenScore
from shoal.jobs.answer import Lines, PromptAnswers, Sample, plain_columns
from shoal.jobs.schema import RowSpec
from shoal.remote.words import Reply

if TYPE_CHECKING:
    from shoal.jobs.feed import Row


@dataclass(slots=True)
class ReplyPart:
    """A call in flight: what `Part` is to an engine of ours. It has come to nothing until it has come to its end."""

    row: Row
    number: int
    request: Request
    cancelled: bool = False
    handed: float = 0.0
    watched: bool = False
    over: bool = False
    scores: Sequence[TokenScore] = ()

    def extend(self, output: Output) -> None:
        """A reply comes in one piece."""

    def sample(self, output: Output) -> Sample | None:
        """The whole reply; None of a call that was broken off."""
        assert isinstance(output, Reply), output
        if output.finish is Finish.CANCEL:
            return None
        return Sample(output.body, array(TOKEN), "stop", usage=output.usage)

    def error(self, output: Output) -> RowError:
        """Why there is none."""
        assert isinstance(output, Reply), output
        return RowError(output.error, output.code)


class ReplyWriter(Lines):
    """Makes lines of replies."""

    def answer(self, row: RowSpec, answers: Sequence[PromptAnswers]) -> bytes:
        """The output line of a row."""
        (sample,) = answers[0].samples
        if row.endpoint != "plain" or self.envelopes:
            return self.envelope(row, msgspec.Raw(sample.text.encode()))
        choices = msgspec.json.decode(sample.text)["choices"]
        texts = [_content(choice) for choice in choices]
        return msgspec.json.encode(
            plain_columns(row, texts, [choice["finish_reason"] for choice in choices], sample.usage or (0, 0))
        )


def _content(choice: dict[str, Any]) -> Any:
    """The text of a choice; a message that has none, for it calls tools, as a whole."""
    if "message" not in choice:
        return choice["text"]
    content = choice["message"].get("content")
    return choice["message"] if content is None else content
