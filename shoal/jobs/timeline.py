"""What a job computed when: prompt and answer tokens, memory and requests, in columns of equal width.

It must not know where numbers come from, nor how they are shown. However long a job takes, the columns stay few: when
there are too many, two and two become one, or the oldest are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

QUARTER = 0.25  # seconds: a step of a small model takes less, a job rarely
MOST = 480  # columns of a whole job: more cannot be told apart in a picture


_Number = TypeVar("_Number", int, float)


class Timeline(msgspec.Struct):
    """Seconds count from the job's start, with the times in which no run was at work left out."""

    width: float = QUARTER  # of a column
    since: float = 0.0  # where the first column begins
    begins: list[float] = []  # where runs of the job began, after the first
    prompt: list[float] = []  # tokens computed
    output: list[float] = []  # tokens
    kv: list[float] = []  # the largest share of the memory for keys and values
    running: list[int] = []  # requests, the most

    def add(self, begin: float, end: float, prompt: int, output: int, kv: float, running: int) -> None:
        """What was computed from `begin` to `end`: one long step is spread over its columns."""
        end = max(end, begin, self.since)
        begin = max(begin, self.since)
        first, last = (int((at - self.since) // self.width) for at in (begin, end))
        for values in (self.prompt, self.output, self.kv, self.running):
            values.extend([0] * (last + 1 - len(values)))
        for column in range(first, last + 1):
            left = self.since + column * self.width
            inside = min(end, left + self.width) - max(begin, left)
            share = inside / (end - begin) if end > begin else 1.0
            self.prompt[column] += prompt * share
            self.output[column] += output * share
            self.kv[column] = max(self.kv[column], kv)
            self.running[column] = max(self.running[column], running)

    def shrink(self, most: int = MOST) -> None:
        """Make columns wider until there are few."""
        while len(self.prompt) > most:
            self.width *= 2
            self.prompt, self.output = _pairs(self.prompt, sum), _pairs(self.output, sum)
            self.kv, self.running = _pairs(self.kv, max), _pairs(self.running, max)

    def forget(self, most: int) -> None:
        """Forget the oldest columns."""
        if (over := len(self.prompt) - most) > 0:
            self.since += over * self.width
            for values in (self.prompt, self.output, self.kv, self.running):
                del values[:over]

    @property
    def end(self) -> float:
        """Where the last column ends."""
        return self.since + self.width * len(self.prompt)

    def kept(self) -> Timeline:
        """As it is written down: in whole tokens and thousandths."""
        return Timeline(
            self.width, round(self.since, 3), [round(at, 3) for at in self.begins],
            [round(tokens) for tokens in self.prompt], [round(tokens) for tokens in self.output],
            [round(share, 3) for share in self.kv], self.running,
        )  # fmt: skip


def _pairs(values: list[_Number], join: Callable[[Iterable[_Number]], _Number]) -> list[_Number]:
    return [join(values[place : place + 2]) for place in range(0, len(values), 2)]
