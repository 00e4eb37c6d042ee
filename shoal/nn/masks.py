"""Masks for rows under a constraint, made while the model computes: asked for early, waited for as late as can be.

It knows tickets and two threads of its own; it must not know logits, nor how a constraint becomes a mask.
A row's mask for its next token needs its last one, so the work begins when a token is sampled and has the next step's
whole forward to end in. Compiling takes longer, and has a thread to itself: it keeps no other row waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shoal.core.errors import ModelError
from shoal.core.types import Constraint, Sampling, Start

Bits = npt.NDArray[np.int32]


class Followed(Protocol):
    """A row under its constraint, as far as it has come."""

    problem: str  # why it cannot go on, or ''
    bits: Bits | None  # int32 [W]: the tokens that may come next; None when none is expected, or it is open
    open: bool  # what may come next has not been made out: it can be asked about one token
    forced: list[int]  # tokens that have to come before those, and have been followed; whoever uses them empties it

    @property
    def quick(self) -> bool:
        """Whether it will need no mask to go on: that is not worth a thread."""
        ...


class Follower(Protocol):
    """Whoever makes masks of constraints."""

    def begin(
        self, constraint: Constraint, stop: frozenset[int], limit: int, produced: Sequence[int], jumps: bool,
        tries: bool,
    ) -> Followed:  # fmt: skip
        """A row that has produced those tokens. One that jumps goes on by itself where only one token may come; one
        that tries is open where it can be."""
        ...

    def accept(self, rows: Sequence[tuple[Any, int]]) -> list[bool]:
        """Whether each row, which is open, may take that token. One that may has produced it; one that may not has
        bits."""
        ...

    def advance(self, rows: Sequence[tuple[Any, int]]) -> None:
        """Each row has produced that token."""
        ...


@dataclass(frozen=True, slots=True)
class _Unfollowed:
    """A row that nobody can follow."""

    problem: str
    bits: Bits | None = None
    open: bool = False
    quick: bool = True
    forced: list[int] = field(default_factory=list)


class Masks:
    """The masks of every constrained ticket. `start` may be called by any thread, the rest by the sampler's."""

    def __init__(self, make: Callable[[], Follower]) -> None:
        """`make` is called when the first constraint comes, in a thread of this object."""
        self._make = make
        self._follower: Follower | None = None
        self._compiling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-compile")
        self._following = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-masks")
        self._begun: dict[int, Future[Followed]] = {}  # by ticket
        self._rows: dict[int, Followed] = {}  # those whose masks have been taken
        self._advance: Future[None] | None = None  # the work on tokens given last

    def start(self, start: Start) -> None:
        """Begin to follow a ticket whose request has a constraint; nothing for others."""
        if start.request.constraint is not None:
            self._begun[start.ticket] = self._compiling.submit(self._begin, start, start.request.constraint)

    def drop(self, ticket: int) -> None:
        """Forget a ticket; one that was never followed is no error."""
        self._begun.pop(ticket, None)
        self._rows.pop(ticket, None)

    def take(self, tickets: Sequence[int]) -> list[Followed]:
        """The rows of these tickets as they stand after all their tokens. Waits for what is not there yet."""
        if self._advance is not None:
            self._advance.result()
        for ticket in tickets:
            if ticket not in self._rows:
                self._rows[ticket] = self._begun[ticket].result()
        return [self._rows[ticket] for ticket in tickets]

    def refused(self, tokens: dict[int, int]) -> dict[int, Followed]:
        """These tickets, whose rows have been taken and are open, produce those tokens. Gives the rows that may not."""
        assert self._follower is not None
        rows = [(self._rows[ticket], token) for ticket, token in tokens.items()]
        may = self._follower.accept(rows)
        return {ticket: row for ticket, (row, _), yes in zip(tokens, rows, may, strict=True) if not yes}

    def give(self, tokens: dict[int, int]) -> None:
        """These tickets, whose rows have been taken and are not open, have produced a token each."""
        if not tokens:
            return  # perhaps there is nobody to follow rows
        assert self._follower is not None
        rows = [(self._rows[ticket], token) for ticket, token in tokens.items()]
        quick, slow = [each for each in rows if each[0].quick], [each for each in rows if not each[0].quick]
        if quick:
            self._follower.advance(quick)
        if slow:
            self._advance = self._following.submit(self._go_on, slow, self._advance)

    def close(self) -> None:
        """End the threads. No ticket may follow."""
        self._compiling.shutdown()
        self._following.shutdown()

    # -- in threads of this object -------------------------------------------------------------------

    def _begin(self, start: Start, constraint: Constraint) -> Followed:
        if self._follower is None:
            try:
                self._follower = self._make()
            except ModelError as error:
                return _Unfollowed(f"constraints cannot be kept: {error}")
        sampling = start.request.sampling
        jumps = _has_no_say(sampling)
        tries = jumps and sampling.greedy  # the best of all tokens is the best of those that may come, if it may
        return self._follower.begin(constraint, sampling.stop, sampling.max_tokens, start.produced, jumps, tries)

    def _go_on(self, rows: Sequence[tuple[Followed, int]], before: Future[None] | None) -> None:
        if before is not None:
            before.result()  # what went wrong there is raised where masks are taken
        assert self._follower is not None
        self._follower.advance(rows)


def _has_no_say(s: Sampling) -> bool:
    """Whether a token that alone may come needs no logits: nothing is told of them, and no wish can forbid it."""
    wishes = s.logit_bias or s.allowed or s.banned or s.min_tokens
    penalties = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
    return not (wishes or penalties) and s.logprobs < 0
