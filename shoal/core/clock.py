"""Time, as the engine sees it: a Clock to read and a SimClock to move. It must not ask the computer for the time."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed moment; never goes back."""

    def now(self) -> float: ...


class SimClock:
    """A clock that a simulation moves by hand."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance_to(self, when: float) -> None:
        """Set the time to `when` [s]; going back is a ValueError."""
        if when < self._now:
            raise ValueError(f"time cannot go back: now {self._now}, asked for {when}")
        self._now = when
