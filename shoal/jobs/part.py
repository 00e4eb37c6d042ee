"""One request in flight: the text it has come to, and when that is over. It must not know of other requests."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Finish, Output, Request, Tokens, TokenScore
from shoal.jobs.answer import Sample
from shoal.jobs.loops import LOOP, Rule
from shoal.jobs.schema import RowSpec
from shoal.text.detok import Detokenizer
from shoal.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from shoal.jobs.feed import Row

EXHAUSTED = "kv_exhausted: "
CONSTRAINT = "constraint: "
LOOPED = "repetition"  # stop_reason of an answer that was ended because it repeated itself


@dataclass(slots=True)
class Part:
    """A request, and what has come of it."""

    row: Row
    number: int  # of the prompt within the row
    request: Request
    detok: Detokenizer
    cancelled: bool = False  # we ended it; the engine may not know yet
    looped: bool = False
    loops: Rule | None = field(init=False)  # what ends an answer that repeats itself
    handed: float = 0.0  # when it was handed out [s]
    text: list[str] = field(default_factory=list)
    tokens: Tokens = field(default_factory=lambda: array(TOKEN))
    logprobs: list[TokenScore] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loops = self.row.spec.loops

    @property
    def watched(self) -> bool:
        """Whether its text may end it before the engine knows."""
        return bool(self.row.spec.stop) or self.loops is not None

    @property
    def over(self) -> bool:
        """Whether its text is complete, whatever else the engine brings."""
        return self.looped or self.detok.stopped is not None

    def extend(self, output: Output) -> None:
        """Take the tokens of an output."""
        if self.over:
            return
        spec = self.row.spec
        tokens = output.tokens
        stop_token = output.finish is Finish.STOP and bool(tokens)
        if self.loops is not None:
            end = self.loops.end(self.tokens, array(TOKEN, tokens[:-1] if stop_token else tokens))
            if end >= 0:
                self.looped, tokens, stop_token = True, tokens[:end], False
        shown = tokens[:-1] if stop_token and not spec.body.include_stop_str_in_output else tokens
        self.text.append(self.detok.push(shown))
        self.scores += output.scores
        used = len(tokens) if self.detok.stopped is None else self.detok.num_tokens - len(self.tokens)
        self.tokens.extend(tokens[:used])
        self.logprobs += output.logprobs[:used]

    def error(self, output: Output) -> RowError:
        """Why it has no answer."""
        return row_error(output.error)

    def sample(self, output: Output) -> Sample:
        """The finished answer; `output` is the one that ended it."""
        self.text.append(self.detok.finish())
        finish: Literal["stop", "length"] = "length" if output.finish is Finish.LENGTH or self.looped else "stop"
        reason: int | str | None = LOOPED if self.looped else None
        if self.detok.stopped is not None:
            finish, reason = "stop", self.detok.stopped
        elif not self.looped and output.finish is Finish.STOP and self.tokens:
            reason = self.tokens[-1] if self.tokens[-1] in (self.row.spec.body.stop_token_ids or ()) else None
        return Sample("".join(self.text), self.tokens, finish, reason, self.logprobs, output.vector or ())


def parts_of(tokenizer: Tokenizer) -> Callable[[Row, int, Request], Part]:
    """What makes parts of a row's requests, whose answers are this tokenizer's tokens."""

    def part(row: Row, number: int, request: Request) -> Part:
        spec, body = row.spec, row.spec.body
        keep = bool(body.include_stop_str_in_output)
        special = body.skip_special_tokens is not False
        return Part(row, number, request, Detokenizer(tokenizer, special, spec.stop, keep, body.min_tokens or 0))

    return part


def loop_period(spec: RowSpec, sample: Sample) -> int:
    """The period of the loop in which an answer was cut off; 0 for one that ended by itself."""
    if sample.finish != "length":
        return 0
    rule = spec.loops if sample.stop_reason == LOOPED else None
    return (rule or LOOP).period(sample.tokens)


def row_error(text: str) -> RowError:
    """An engine's complaint as the error of a row."""
    if text.startswith(EXHAUSTED):
        return RowError(text.removeprefix(EXHAUSTED), "kv_exhausted", "max_tokens")
    if text.startswith(CONSTRAINT):
        return RowError(text.removeprefix(CONSTRAINT), "invalid_constraint")
    return RowError(text, "internal")
