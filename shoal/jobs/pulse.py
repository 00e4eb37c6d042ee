"""What a running job notes of itself in its journal, so that others can follow it: how it stands, and what it computed
when.

It knows numbers that the job's loop tells it, and writes them with the commits that the rows need anyway; it must not
know how anybody shows them, nor decide anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from shoal.jobs.display import Progress, Rates
from shoal.jobs.journal import Journal
from shoal.jobs.timeline import Timeline
from shoal.jobs.watches import Straggler

PULSE = "pulse"  # keys in the journal
TIMELINE = "timeline"
RECENT = 180  # columns of a second of the last minutes
LONGEST = 5  # rows that run are named
UNKNOWN = Rates()

State = Literal["loading", "running", "restarting", "checking", "ended"]


class Pulse(msgspec.Struct, frozen=True):
    """A job at one moment."""

    at: float  # Unix time
    state: State
    progress: Progress
    tokens_in: float = 0.0  # a second
    tokens_out: float = 0.0
    seconds_left: float | None = None  # None: nobody knows
    waiting: int = 0  # requests
    running: int = 0
    restarts: int = 0  # of the engine, in this run
    longest: tuple[Straggler, ...] = ()  # rows that run, those that have run longest first
    recent: Timeline = msgspec.field(default_factory=Timeline)

    @property
    def rates(self) -> Rates:
        """As the display shows them."""
        return Rates(self.tokens_in, self.tokens_out, math.inf if self.seconds_left is None else self.seconds_left)


class Recorder:
    """Keeps the time line and the pulse of one run. Changed by the job's meter alone."""

    def __init__(self) -> None:
        self.state: State = "loading"
        self.checking = False  # what is computed now is compared, and no part of the job
        self.restarts = 0
        self._before = 0.0  # seconds of earlier runs
        self._heard = 0.0  # seconds of this run: up to there all is in the time line
        self._totals = (0, 0)  # prompt and output tokens up to there
        self._requests = (0, 0)  # waiting and running
        self._whole, self._recent = Timeline(), Timeline(width=1.0)

    def resume(self, journal: Journal, before: float) -> None:
        """Go on where earlier runs, of `before` seconds, have stopped."""
        self._before = before
        if (noted := journal.meta(TIMELINE)) is not None:
            try:
                self._whole = msgspec.json.decode(noted, type=Timeline)
            except msgspec.MsgspecError:  # of another version: no answer depends on it, and it is begun anew
                self._whole = Timeline(since=before)
        if before:
            self._whole.begins.append(before)
        self._recent.since = float(math.floor(before))

    def loaded(self, seconds: float) -> None:
        """An engine is ready, after so many seconds of this run."""
        self.state, self._heard = "running", seconds

    def died(self, others: bool = False) -> None:
        """An engine is gone, and others go on or there are none."""
        if not others:
            self.state, self._requests = "restarting", (0, 0)
        self.restarts += 1

    def hear(self, seconds: float, totals: tuple[int, int], kv: float, waiting: int, running: int) -> None:
        """At this second of the run so many prompt and output tokens have been computed, all in all."""
        prompt, output = totals[0] - self._totals[0], totals[1] - self._totals[1]
        self._totals, self._requests = totals, (waiting, running)
        self.state = "running"
        if not self.checking:
            for line in (self._whole, self._recent):
                line.add(self._before + self._heard, self._before + seconds, prompt, output, kv, running)
        self._heard = seconds

    def note(
        self, journal: Journal, progress: Progress, rates: Rates = UNKNOWN, longest: Iterable[Straggler] = ()
    ) -> None:
        """Have the next commit keep how things stand."""
        self._whole.shrink()
        self._recent.forget(RECENT)
        left = rates.seconds_left
        state: State = "checking" if self.checking and self.state == "running" else self.state
        pulse = Pulse(
            time.time(), state, progress, rates.tokens_in, rates.tokens_out,
            left if math.isfinite(left) else None, *self._requests, self.restarts, tuple(longest), self._recent.kept(),
        )  # fmt: skip
        journal.note(PULSE, msgspec.json.encode(pulse).decode())
        journal.note(TIMELINE, msgspec.json.encode(self._whole.kept()).decode())
