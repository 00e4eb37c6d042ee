"""The words of the engine: what is asked (Request), what is planned (Step), what came back (StepResult).

Plain data, standard library only; it must not know about tensors, files or the wall clock.
Times are seconds on the engine's clock; lengths are tokens.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

PENDING = -1  # a token that an earlier step is still computing; the executor knows it first

TOKEN = "i"  # array typecode of a token id: 4 bytes, signed

Tokens: TypeAlias = "array[int]"  # array("i"); prompts are slices of a job's arena copied out once


class Finish(Enum):
    """How a request ended. Every request ends exactly once."""

    STOP = "stop"  # a stop token was produced
    LENGTH = "length"  # max_tokens was reached
    CANCEL = "cancel"  # the caller gave up (or found its stop string)
    REJECT = "reject"  # never admitted; Output.error says why and what to do
    ERROR = "error"  # it could not be finished; Output.error says why and what to do


class Answer(Enum):
    """What a request wants back."""

    TOKENS = "tokens"  # sampled tokens, with log-probabilities where asked
    VECTOR = "vector"  # the hidden state of its last position, or what the model's own pooling makes of all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy and change nothing.

    Order of application: logit bias, the request's constraint, allowed/banned/min_tokens masks, repetition, presence
    and frequency penalties, temperature, top-k, top-p, min-p, then the draw.
    """

    max_tokens: int = 128  # may be 0 when only scores or a vector are wanted
    min_tokens: int = 0  # until then no token of `stop` may be sampled
    stop: frozenset[int] = frozenset()  # token ids that end the answer (end-of-sequence included, unless ignored)
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output; 1 changes nothing
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()  # only these tokens, when not empty
    banned: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    seed: int = 0  # with the sample index, position and draw it decides every random number
    sample: int = 0  # index among the n samples of one prompt
    logprobs: int = -1  # -1: none; k >= 0: the sampled token's and the k best

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def root_of(adapter: str, salt: str) -> str:
    """The name under which prompts may share keys and values: no two pairs have the same, as no adapter has a NUL."""
    return f"{adapter}\0{salt}" if salt else adapter


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of an answer must be. Equal constraints have equal texts; only who makes masks reads them."""

    kind: str  # "json": a schema; "regex"; "choice": a JSON list of texts; "grammar"; "calls": of tools, as JSON
    text: str


@dataclass(frozen=True, slots=True)
class Promise:
    """How soon a request's tokens are wanted. Infinity promises nothing."""

    first: float = math.inf  # seconds from its arrival to its first token
    gap: float = math.inf  # seconds between one token and the next


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. Never changes after it is made."""

    id: str
    prompt: Tokens  # array("i"), at least one token
    sampling: Sampling = Sampling()
    answer: Answer = Answer.TOKENS
    constraint: Constraint | None = None  # on the sampled tokens' text
    score_from: int = -1  # >= 1: log-probabilities of prompt tokens from this position on; -1: none
    score_top: int = 0  # with score_from: how many best tokens to report at each position
    arrival: float = 0.0  # seconds
    deadline: float = math.inf  # seconds; of the whole answer
    promise: Promise | None = None  # of its single tokens
    adapter: str = ""  # LoRA name; also part of the root of its own prefix tree
    salt: str = ""  # rows with different salts share nothing
    group: str = ""  # user, job or workflow: the unit of fairness and of length learning
    program: str = ""  # the agent or graph of calls it is a turn of; "" stands alone. A unit of order, not of sharing
    guess: float | None = None  # predicted output length, a hint; never the truth
    index: int = -1  # place in plan order; -1 for requests without a plan
    future: tuple[tuple[int, int], ...] | None = None
    """Known future of the prompt: pairs (depth, index): its first `depth` tokens are next needed by the row at
    plan index `index`. () means nobody needs it again, None that nobody knows."""

    @property
    def root(self) -> str:
        """Prompts under different roots never share keys and values."""
        return root_of(self.adapter, self.salt)

    @property
    def samples(self) -> bool:
        """Whether a token is to be sampled at all."""
        return self.answer is Answer.TOKENS and self.sampling.max_tokens > 0

    @property
    def goal(self) -> int:
        """Prompt positions that must be computed: the last one only where its hidden state is needed."""
        return max(1, len(self.prompt) - (0 if self.samples or self.answer is Answer.VECTOR else 1))


@dataclass(frozen=True, slots=True)
class Slice:
    """One sequence's part of a step: compute `tokens` at positions start, start+1, …"""

    ticket: int  # new each time a sequence starts to run
    start: int
    tokens: Tokens  # the last may be PENDING: the one the executor just sampled for this ticket
    blocks: tuple[int, ...]  # block i holds positions [i*B, (i+1)*B)
    want: int  # how many trailing positions' hidden states are needed
    draft: int = 0  # the executor may guess up to this many tokens ahead


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the first `tokens` positions of block `src` to block `dst`, before anything else in the step."""

    src: int
    dst: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Start:
    """A ticket new to the executor, with the tokens its request has produced so far."""

    ticket: int
    request: Request
    produced: Tokens


@dataclass(frozen=True, slots=True)
class Step:
    """A plan: everything an executor needs, and nothing it may change.

    Order within a step: drops of earlier tickets, starts, moves, then all slices at once; in every layer all
    keys and values are written before any is read, so a slice may read what another slice of the step writes.
    """

    index: int
    slices: tuple[Slice, ...]
    starts: tuple[Start, ...] = ()
    moves: tuple[Move, ...] = ()
    drops: tuple[int, ...] = ()  # tickets the executor may forget

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) + s.draft for s in self.slices)


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be planned before `until` (seconds) unless something changes."""

    until: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability and rank (1 is best), with the best alternatives at its position."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepResult:
    """What a step produced, by ticket."""

    tokens: dict[int, list[int]]  # 1 … draft+1 sampled tokens of every slice that reached its sequence's end
    forced: dict[int, list[int]] = field(default_factory=dict)  # those that must follow; nothing of them is computed
    logprobs: dict[int, list[TokenScore]] = field(default_factory=dict)  # of the sampled tokens, where asked
    scores: dict[int, list[TokenScore]] = field(default_factory=dict)  # of prompt tokens, where asked
    vectors: dict[int, Sequence[float]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # tickets that cannot go on; their written KV is good
    seconds: float = 0.0


@dataclass(slots=True)
class Output:
    """News of one request: tokens since the last Output, and how it ended, once."""

    id: str
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""
    logprobs: list[TokenScore] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    vector: Sequence[float] | None = None
    timing: Mapping[str, float] | None = None  # with finish: arrival, start, first, end [s], cached, preemptions
