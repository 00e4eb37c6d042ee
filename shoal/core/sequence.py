"""A request in progress. Changed by the scheduler and the cache alone; policies look, and do not touch.

It must not know why it is scheduled, nor how long its answer will be.
"""

from __future__ import annotations

from array import array

from shoal.core.types import PENDING, TOKEN, Request


class Sequence:
    """Invariant: 0 <= computed <= len(tokens), and computed <= len(blocks) * B while it runs."""

    __slots__ = (
        "request", "samples", "goal", "stop", "number", "ticket", "tokens", "num_prompt", "computed", "blocks",
        "table", "private_from", "guessing", "scored", "preemptions", "keep_until", "started", "first_token", "cached",
        "limit",
    )  # fmt: skip

    def __init__(self, request: Request, number: int) -> None:
        self.request = request
        self.samples, self.goal, self.stop = request.samples, request.goal, request.sampling.stop  # asked in every step
        self.number = number  # order of arrival at this scheduler: the last word in every tie
        self.ticket = -1  # -1 while it waits
        self.tokens = array(TOKEN, request.prompt)  # prompt, then outputs; may end in PENDING
        self.num_prompt = len(self.tokens)
        self.computed = 0  # keys and values of tokens[:computed] are in `blocks`, or will be after the steps in flight
        self.blocks: list[int] = []
        self.table: tuple[int, ...] = ()  # `blocks` as data for a Slice; a new object only when it changed
        self.private_from = 0  # blocks[private_from:] are nobody else's: what its end will free
        self.guessing = False  # a draft is in flight, so our length is not known
        self.scored = request.score_from - 1  # next position whose hidden state scores a prompt token; < 0: none
        self.preemptions = 0
        self.keep_until = 0  # tokens it is to know before it is preempted again: it has repaid what that cost
        self.started: float | None = None
        self.first_token: float | None = None
        self.cached = 0  # prompt tokens it did not have to compute, at its first start
        self.limit = self.goal + (request.sampling.max_tokens if self.samples else 0)  # tokens at its end

    @property
    def running(self) -> bool:
        return self.ticket >= 0

    @property
    def yields(self) -> bool:
        """Whether it may lose its memory to others. A token in flight does not count: it would be lost."""
        return len(self.tokens) - (self.tokens[-1] == PENDING) >= self.keep_until

    @property
    def pending(self) -> int:
        """Tokens known and needed but not computed: the prompt at first, one in steady decode."""
        return (len(self.tokens) if self.samples else self.goal) - self.computed

    @property
    def produced(self) -> int:
        """Output tokens, one of them perhaps PENDING."""
        return len(self.tokens) - self.num_prompt

    @property
    def outputs(self) -> array[int]:
        """Output tokens whose values are known."""
        out = self.tokens[self.num_prompt :]
        if out and out[-1] == PENDING:
            out.pop()
        return out
