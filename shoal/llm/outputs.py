"""What LLM gives back, with vLLM's names, and how an answer grows from the engine's news into it.

It must not know engines or schedulers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.core.types import Finish, Output, Request, TokenScore
from shoal.llm.params import SamplingParams
from shoal.text.detok import Detokenizer
from shoal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability, its rank (1 is best) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # the token itself first, then the best


@dataclass(slots=True)
class CompletionOutput:
    """One answer of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop", "length", or "error"
    stop_reason: int | str | None = None  # the stop string or stop token id; None for the end-of-sequence token
    error: str | None = None  # with finish_reason "error": what was wrong and what to do

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its answers, all finished."""

    request_id: str
    prompt: str | None  # None where it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None for the first token, which nothing precedes
    finished: bool = True
    metrics: Mapping[str, float] | None = None  # seconds: arrival, start, first, end; preemptions
    lora_request: str | None = None  # the name of its adapter
    num_cached_tokens: int = 0

    @property
    def error(self) -> str | None:
        """Why an answer is missing, or None."""
        return next((each.error for each in self.outputs if each.error), None)


@dataclass(slots=True)
class Answer:
    """One sample under way. `take` it the engine's news until it says that the answer is over."""

    request: Request
    params: SamplingParams
    tokenizer: Tokenizer
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    timing: Mapping[str, float] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.detokenizer = Detokenizer(
            self.tokenizer, p.skip_special_tokens, p.stops, p.include_stop_str_in_output, p.min_tokens
        )

    def take(self, news: Output) -> bool:
        """Add news; True when a stop string has ended the answer, so that its request may be cancelled."""
        self.tokens += news.tokens
        self.scores += news.logprobs
        self.prompt_scores += news.scores
        self.timing = news.timing or self.timing
        text = news.tokens
        if news.finish is Finish.STOP and text and not self.params.include_stop_str_in_output:
            text = text[:-1]  # a stop token is in token_ids, its text is not in the text
        if self.params.detokenize:
            self.pieces.append(self.detokenizer.push(text))
            if self.detokenizer.stopped is not None:
                self._end("stop", self.detokenizer.stopped)
                del self.tokens[self.detokenizer.num_tokens :]
                del self.scores[self.detokenizer.num_tokens :]
                return news.finish is None
            if news.finish is not None:
                self.pieces.append(self.detokenizer.finish())
        if news.finish is Finish.STOP:
            stop = self.tokens[-1] if self.tokens else None
            self._end("stop", None if stop in self.eos and not self.params.ignore_eos else stop)
        elif news.finish is Finish.LENGTH:
            self._end("length", None)
        elif news.finish is not None:
            self.error = news.error or "cancelled"
            self._end("error", None)
        return False

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    def completion(self) -> CompletionOutput:
        """The finished answer."""
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=self.request.sampling.sample,
            text="".join(self.pieces),
            token_ids=self.tokens,
            cumulative_logprob=sum(each.logprob for each in self.scores) if asked else None,
            logprobs=[_position(each, self.tokenizer) for each in self.scores] if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def prompt_logprobs(self) -> list[PositionLogprobs | None] | None:
        """For each prompt token, where asked."""
        if self.params.prompt_logprobs is None:
            return None
        return [None, *(_position(each, self.tokenizer) for each in self.prompt_scores)]


def failed(request_id: str, prompt: str | None, tokens: list[int], message: str) -> RequestOutput:
    """The output of a prompt that could not be run."""
    return RequestOutput(
        request_id, prompt, tokens, [CompletionOutput(0, "", [], finish_reason="error", error=message)]
    )


def _position(score: TokenScore, tokenizer: Tokenizer) -> PositionLogprobs:
    found = {score.token: Logprob(score.logprob, score.rank, tokenizer.token_text(score.token))}
    for place, (token, logprob) in enumerate(score.top):
        found.setdefault(token, Logprob(logprob, place + 1, tokenizer.token_text(token)))
    return found
