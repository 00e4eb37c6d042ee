"""What is left of a running job: asks whoever foretold it, not too often, and keeps what was said.

It knows a course, the counts of a run and the time; it must not know how anything is predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from shoal.jobs.foretold import SOON, Course, Tail, attempt

EVERY = 1.0  # seconds between two looks ahead, at least
SHARE = 100  # times what the last one took


class Outlook:
    """The time left of one run. Changed by the job's loop alone."""

    def __init__(self, course: Course, rows: int, ended: int) -> None:
        """`rows` of the job have to be computed, of which earlier runs have `ended` some."""
        self.soon: float | None = None  # seconds all in all, as estimated when a twentieth of the rows had ended
        self.soon_span: tuple[float, float] | None = None  # least and most
        self._course = course
        self._share = SOON * rows
        self._ended = ended
        self._passed = ended >= self._share  # that moment was in an earlier run, or has come
        self._before = 0.0  # seconds of all runs before the engine began
        self._began: float | None = None
        self._due = -math.inf
        self._end: float | None = None  # when the last row will end
        self.why = ""  # nothing more is said

    def ended(self, row: int, stats: Mapping[str, object]) -> None:
        """A row that was computed has ended."""
        tokens = stats.get("completion_tokens", 0)
        assert isinstance(tokens, int)
        self._ended += 1
        self._ask(lambda: self._course.ended(row, tokens))

    def begin(self, now: float, before: float) -> None:
        """The engine begins, after so many seconds of the job over all its runs."""
        self._began, self._before = now, before

    def left(self, now: float, tokens: int, output: int, running: Callable[[], Sequence[float]]) -> float | None:
        """Seconds left when so many tokens, of them `output` of answers, were computed; None when nobody can say.
        `running` has the seconds that each request has run."""
        if self._began is None or not tokens or self.why:
            return None
        soon = not self._passed and self._ended >= self._share
        if soon or now >= self._due:
            began, passed, ages = time.monotonic(), now - self._began, running()
            found = self._ask(lambda: self._course.left(passed, tokens, output, ages))
            self._end = None if found is None else now + found
            self._due = now + max(EVERY, SHARE * (time.monotonic() - began))
            if soon and found is not None:
                self._passed, self.soon = True, self._before + passed + found
                extremes: tuple[Tail, ...] = ("least", "most")
                left = [self._ask(partial(self._course.left, passed, tokens, output, ages, tail)) for tail in extremes]
                known = [self.soon, *(self._before + passed + each for each in left if each is not None)]
                self.soon_span = min(known), max(known)
        return None if self._end is None else max(self._end - now, 0.0)

    def _ask(self, ask: Callable[[], float | None]) -> float | None:
        """Ask the course, until it fails."""
        found = None if self.why else attempt(ask)
        if isinstance(found, str):
            self.why = found
            return None
        return found
