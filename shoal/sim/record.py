"""What became of one simulated request: when it came, when its tokens did, how it ended.

It knows times and counts; it must not know what is good.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from shoal.core.types import Finish, Promise

SECONDS = "d"  # array typecode of times


@dataclass(slots=True)
class Record:
    """One request. Times are seconds on the simulation's clock."""

    id: str
    arrival: float
    prompt: int  # tokens
    limit: int  # tokens its answer may have
    group: str = ""
    program: str = ""
    promise: Promise | None = None
    deadline: float = math.inf
    instance: int = -1
    start: float = math.nan  # when it ran first; known when it has ended
    times: array[float] = field(default_factory=lambda: array(SECONDS))  # of its tokens, one each
    end: float = math.nan
    finish: Finish | None = None  # None: it had not ended when the simulation did
    error: str = ""
    cached: int = 0  # prompt tokens it found
    preemptions: int = 0

    @property
    def answered(self) -> bool:
        """Whether it ended with an answer."""
        return self.finish in (Finish.STOP, Finish.LENGTH)
