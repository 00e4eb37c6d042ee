"""The two things a job learns from outside while it runs: what time it is, and that it is asked to stop.

It must not know what a job does about either.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class WallClock:
    """Seconds since the computer started; never goes back."""

    def now(self) -> float:
        return time.monotonic()


@dataclass(slots=True)
class Stop:
    """Set by a signal: end after what is under way."""

    asked: bool = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks the job to stop; the second acts as it always does."""
    stop = Stop()
    before: dict[int, Any] = {}  # whatever stood there: a function, a number, None

    def handle(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread: signals are somebody else's
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
