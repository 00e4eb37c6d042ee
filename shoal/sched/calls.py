"""How long tools take, and how long it pays to keep a program's memory while one runs.

It knows durations, waits and numbers of turns; it must not know programs, texts or blocks.
Continuum (arXiv 2511.02230), its sections on the time to live and on its estimate.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq

FEW = 100  # samples up to which a distribution is not trusted
PRIOR = 1.0  # seconds: mean of the exponential law that stands for all tools before
KEPT = 256  # waits, and programs, that are remembered
SAMPLES = 2000  # durations of a tool that are remembered


def best_time(durations: Seq[float], gain: float) -> float:
    """The time to live that gains most: `gain` seconds are saved if the call ends within it, and it costs itself.

    `durations` ascend. The share of calls that have ended jumps at durations alone, so only they and 0 are tried; the
    shortest of equals is taken."""
    best, found = 0.0, 0.0
    for at, duration in enumerate(durations, 1):
        value = at / len(durations) * gain - duration  # of equal durations the last counts them all
        if value > best and (at == len(durations) or durations[at] > duration):
            best, found = value, duration
    return found


def prior_time(gain: float, mean: float = PRIOR) -> float:
    """The same for calls that last exponentially long."""
    return mean * math.log(gain / mean) if gain > mean else 0.0


class Calls:
    """Durations by tool, waits of programs that came back to nothing, and how long programs were."""

    def __init__(self) -> None:
        self._of_tool: dict[str, _Window] = {}
        self._of_all = _Window()
        self._waits: deque[float] = deque(maxlen=KEPT)
        self._turns: deque[int] = deque(maxlen=KEPT)
        self._memory: float | None = None  # until another program ends

    def took(self, tool: str, seconds: float) -> None:
        """A call of the tool lasted so long: from a turn's end to the next request's arrival."""
        if seconds >= 0.0:
            self._of_all.add(seconds)
            self._of_tool.setdefault(tool, _Window()).add(seconds)

    def waited(self, seconds: float) -> None:
        """A program that had no pin was let in again after this wait."""
        self._waits.append(max(seconds, 0.0))

    def over(self, turns: int) -> None:
        """A program has ended after so many turns."""
        self._turns.append(turns)
        self._memory = None

    @property
    def wait(self) -> float:
        """What a program waits for when its memory was taken: the mean of late; 0 at first [s]."""
        return sum(self._waits) / len(self._waits) if self._waits else 0.0

    @property
    def memoryfulness(self) -> float:
        """How surely a turn done is a turn less to do: minus the correlation of turns done and left, over programs
        that have ended. 1 when all are equally long, 0 when the past says nothing or is none."""
        if self._memory is None:
            pairs = [(done, turns - done) for turns in self._turns for done in range(1, turns)]
            self._memory = -_correlation(pairs)
        return self._memory

    def time_to_live(self, tool: str, reload: float) -> float:
        """Seconds, for a program whose memory takes `reload` seconds to compute again."""
        if self._of_all.count <= FEW:
            return prior_time(self.wait + reload)
        own = self._of_tool.get(tool)
        window = own if own is not None and own.count > FEW else self._of_all
        return best_time(window.ordered, self.wait * self.memoryfulness + reload)


class _Window:
    """The latest samples in order of their size."""

    def __init__(self) -> None:
        self.ordered: list[float] = []
        self._recent: deque[float] = deque()

    @property
    def count(self) -> int:
        return len(self._recent)

    def add(self, sample: float) -> None:
        self._recent.append(sample)
        insort(self.ordered, sample)
        if len(self._recent) > SAMPLES:
            self.ordered.remove(self._recent.popleft())


def _correlation(pairs: list[tuple[int, int]]) -> float:
    if len(pairs) < 2:
        return 0.0
    mean_x, mean_y = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    xx = sum((x - mean_x) ** 2 for x, _ in pairs)
    yy = sum((y - mean_y) ** 2 for _, y in pairs)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0
