"""Which requests run, since when, and which have run for long or too long. It must not know what they are for.

The time is the caller's: seconds on the job's clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.jobs.units import count, duration


@dataclass(frozen=True, slots=True)
class Straggler:
    """A row that runs for longer than others."""

    line: int
    seconds: float
    alone: float = 0.0  # of them, those in which nothing else was left to start: what it costs the job

    def __str__(self) -> str:
        cost = f", {duration(self.alone)} of it with nothing left to start" if self.alone > 0 else ""
        return f"line {count(self.line)} has run for {duration(self.seconds)}{cost}"


class Watches:
    """One stop-watch for each request that runs."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # in the order in which they started
        self._due: list[tuple[float, str]] = []  # a heap; entries of requests that have ended are skipped,
        self._ends: dict[str, float] = {}  # and those that are not of this start of theirs

    def start(self, id: str, now: float, limit: float | None) -> bool:
        """A request runs, for `limit` seconds more at most. False for one that runs already: it goes on."""
        if id in self._since:
            return False
        self._since[id] = now
        if limit is not None:
            self._ends[id] = now + limit
            heapq.heappush(self._due, (now + limit, id))
        return True

    def stop(self, id: str) -> None:
        """It has ended, or runs no more for now."""
        self._since.pop(id, None)
        self._ends.pop(id, None)

    def clear(self) -> None:
        """None runs any more."""
        self._since.clear()
        self._due.clear()
        self._ends.clear()

    def late(self, now: float) -> list[str]:
        """Requests that have run for longer than they may, each named once."""
        found = []
        while self._due and self._due[0][0] <= now:
            end, id = heapq.heappop(self._due)
            if self._ends.get(id) == end:
                found.append(id)
        return found

    def ages(self, now: float) -> list[float]:
        """For how many seconds each has run."""
        return [now - since for since in self._since.values()]

    def oldest(self, now: float) -> tuple[str, float] | None:
        """The one that has run longest, and for how many seconds."""
        id = next(iter(self._since), None)
        return None if id is None else (id, now - self._since[id])

    def running(self, now: float) -> Iterator[tuple[str, float]]:
        """All that run and for how many seconds, those that have run longest first."""
        for id, since in self._since.items():
            yield id, now - since
