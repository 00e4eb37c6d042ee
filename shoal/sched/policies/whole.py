"""Texts that are computed at once or not at all: in the plan's order, as many as a step has room for.

It knows plan indices and lengths; it must not know what becomes of a text. A block of its scheduler holds the longest
text there can be: it stands for a seat and for no memory.
"""

from __future__ import annotations

import math

from shoal.core.sequence import Sequence
from shoal.core.types import Request
from shoal.sched.policy import Budget, Key, Policy, Reach, View


class WholePolicy(Policy):
    """First come, first served in the order of the plan; nothing is cut, and nothing overtakes what does not fit."""

    def __init__(self, limit: Budget, longest: int) -> None:
        """A step of `limit` must have room for the `longest` text, in tokens."""
        assert longest <= limit.tokens, (longest, limit)
        super().__init__(limit)
        self._longest = longest
        self._room = 0  # tokens of this plan's step that nobody has yet

    def accept(self, request: Request, view: View) -> str:
        """Refuse what no step will have room for."""
        if len(request.prompt) > self._longest:
            return f"the text has {len(request.prompt)} tokens, and the model takes {self._longest}: shorten it"
        return ""

    def budget(self, view: View) -> Budget:
        """The same for every step."""
        self._room = self.limit.tokens
        return self.limit

    def rank(self, seq: Sequence, view: View) -> Key:
        """The plan's order; texts without a plan come in order of arrival."""
        return float(seq.request.index)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """Now, if the step has room for all of it; else with the next step."""
        if seq.pending > self._room:
            return math.inf
        self._room -= seq.pending
        return -math.inf

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """All of it, or nothing."""
        return seq.pending if seq.pending <= room else 0
