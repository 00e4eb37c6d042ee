"""Whether a batch job that lives on what others leave will be done in time.

It knows a job's window, its tokens and how many of them are done; it must not know what they are.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

ANNOUNCED = 0.25  # share of the window that is left, at least, when a lateness that shows is announced
LOOKS = 64  # looks that a window is divided into
SURE = 8  # looks before anything is said: a fair part of a day's traffic has been seen


@dataclass(frozen=True, slots=True)
class Job:
    """`tokens` to compute from `begin` to `deadline` [s], prompts and expected answers together."""

    tokens: float
    deadline: float
    begin: float = 0.0

    @property
    def window(self) -> float:
        return self.deadline - self.begin


@dataclass(frozen=True, slots=True)
class Lateness:
    """Said once: at `now` the job is expected to end at `expected`, later than it has to."""

    group: str
    now: float
    expected: float
    deadline: float


class Outlook:
    """Progress of one job against its window, looked at LOOKS times.

    The pace to come is taken for the mean of that since the job began and that of late, so that traffic that grows is
    seen before it has spoilt the mean, and a lull does not frighten.
    """

    def __init__(self, group: str, job: Job) -> None:
        self.group, self.job = group, job
        self.announced: Lateness | None = None
        self._looks: deque[tuple[float, float]] = deque([(job.begin, 0.0)], maxlen=LOOKS // 4)
        self._seen = 0

    def expected(self, now: float, done: float) -> float:
        """When the job will have ended [s]."""
        job = self.job
        left = job.tokens - done
        if left <= 0.0:
            return now
        since, before = self._looks[0]
        mean = done / (now - job.begin) if now > job.begin else 0.0
        late = (done - before) / (now - since) if now > since else mean
        pace = (mean + late) / 2
        return now + left / pace if pace > 0.0 else math.inf

    def behind(self, now: float, done: float) -> bool:
        """Whether less is done than the window's even pace would have done by now."""
        job = self.job
        return now > job.begin and done < job.tokens * min(1.0, (now - job.begin) / job.window)

    def look(self, now: float, done: float) -> Lateness | None:
        """To be called often. What is to be announced, once: from then on nothing."""
        job = self.job
        if self.announced is not None or now < self._looks[-1][0] + job.window / LOOKS or now >= job.deadline:
            return None
        expected = self.expected(now, done)
        self._looks.append((now, done))
        self._seen += 1
        if self._seen < SURE or expected <= job.deadline:
            return None
        self.announced = Lateness(self.group, now, expected, job.deadline)
        return self.announced
