"""Which of several instances a request goes to, asked when it arrives.

It knows how much work each instance has been given and not done; it must not know a true length, nor what an instance
prefers to do first.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from shoal.core.types import Request


@dataclass(slots=True)
class Load:
    """What an instance has to do. Kept by whoever hands requests out."""

    requests: int = 0  # that have not ended
    prompt: int = 0  # tokens of prompts whose first token has not come


class Placement(Protocol):
    """Whoever hands requests out asks it."""

    def choose(self, request: Request, loads: Seq[Load]) -> int:
        """The place of an instance among `loads`, of which there is at least one."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, loads: Seq[Load]) -> int:
        """The one after the last."""
        chosen, self._next = self._next % len(loads), self._next + 1
        return chosen


class ShortestQueue:
    """Where fewest requests have not ended; ties to the first."""

    def choose(self, request: Request, loads: Seq[Load]) -> int:
        """The shortest."""
        return min(range(len(loads)), key=lambda i: loads[i].requests)


class LeastWork:
    """Where fewest prompt tokens wait for their first answer; ties to the shortest queue."""

    def choose(self, request: Request, loads: Seq[Load]) -> int:
        """The least."""
        return min(range(len(loads)), key=lambda i: (loads[i].prompt, loads[i].requests))


class SameProgram:
    """A program's turns go where its first one went, for what is kept there; the first where there is least work."""

    def __init__(self, most: int = 10_000) -> None:
        """`most` programs are remembered, those that were last asked about."""
        self.most = most
        self._first = LeastWork()
        self._places: dict[str, int] = {}

    def choose(self, request: Request, loads: Seq[Load]) -> int:
        """Where its program is."""
        if not request.program:
            return self._first.choose(request, loads)
        place = self._places.pop(request.program, None)
        self._places[request.program] = self._first.choose(request, loads) if place is None else place
        if len(self._places) > self.most:
            del self._places[next(iter(self._places))]
        return self._places[request.program]


PLACEMENTS: dict[str, type[Placement]] = {
    "round-robin": RoundRobin,
    "shortest-queue": ShortestQueue,
    "least-work": LeastWork,
    "same-program": SameProgram,
}
