"""Which requests run, since when, and which of them have run for too long. It must not know what they are for.

The time is the caller's: seconds on the job's clock.
"""

from __future__ import annotations

import heapq


class Watches:
    """One stop-watch for each request that runs."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # in the order in which they started
        self._due: list[tuple[float, str]] = []  # a heap; entries of requests that have ended are skipped

    def start(self, id: str, now: float, limit: float | None) -> None:
        """A request runs, for `limit` seconds at most. One that runs already goes on."""
        if id not in self._since:
            self._since[id] = now
            if limit is not None:
                heapq.heappush(self._due, (now + limit, id))

    def stop(self, id: str) -> None:
        """It has ended."""
        self._since.pop(id, None)

    def clear(self) -> None:
        """None runs any more."""
        self._since.clear()
        self._due.clear()

    def late(self, now: float) -> list[str]:
        """Requests that have run for longer than they may, each named once."""
        found = []
        while self._due and self._due[0][0] <= now:
            _, id = heapq.heappop(self._due)
            if id in self._since:
                found.append(id)
        return found

    def oldest(self, now: float) -> tuple[str, float] | None:
        """The one that has run longest, and for how many seconds."""
        id = next(iter(self._since), None)
        return None if id is None else (id, now - self._since[id])
