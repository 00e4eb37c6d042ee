"""Rows that ask for what an earlier row asks for: they get its answer, each as a line of its own.

It knows which rows are copies of which; it must not know where results are kept, nor the engine.

Of the rows of a group, the first in the file that has not ended is run, and ends last: whatever moment a job is
stopped at, what has ended needs no other row, and what has not can be made again. So no answer is kept for later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from shoal.jobs.feed import Ended, Feed

SOME = 256  # copies made in one round, as many as are committed at once: the engine waits for nobody
LUCK = frozenset("internal engine_died row_timeout server_error no_reply bad_reply".split())
"""Failures that a row may have had by bad luck."""

TRIES = 3  # rows of a group that may fail by bad luck before the others are not tried: each may cost two engines


@dataclass(slots=True)
class _Group:
    ended: Ended
    rows: Iterator[int]  # still without an answer


class Copies:
    """Makes the rows that end with another. Changed by the job's loop alone."""

    def __init__(self, feed: Feed, done: Callable[[int], bool]) -> None:
        """`done` says of an input line whether it has ended. Groups that an earlier run left half way go on."""
        self._feed, self._plan, self._done = feed, feed.plan, done
        self._groups: deque[_Group] = deque()
        self._original: dict[int, int] = {}  # of copies that run in its place
        self.left = 0  # copies that have not ended
        group = -1
        for original, row in self._plan.copies():
            if done(self._plan.line(row)):
                continue
            self.left += 1
            if original != group and done(self._plan.line(original)):
                self._run_instead(original, row)
            group = original

    @property
    def waiting(self) -> bool:
        """Whether there is something to make now."""
        return bool(self._groups)

    def add(self, ended: Ended) -> list[Ended]:
        """A row that was run is over: what can be noted of it now. With copies it is noted after them."""
        original = self._original.pop(ended.row, ended.row)
        if original != ended.row:
            self.left -= 1
        left = [row for row in self._left(original) if row != ended.row]
        code = ended.error.code if left and ended.error is not None else ""
        instead: int | None = None
        if code in LUCK and self._tried(original, ended.row) < TRIES:
            instead = left[0]
        elif code == "row_timeout":
            instead = self._more_patient(left, ended.spec.body.timeout)
        if instead is not None:
            self._run_instead(original, instead)
        if instead is not None or not left:
            return [ended]
        self._groups.append(_Group(ended, iter(left)))
        return []

    def make(self) -> Iterator[Ended]:
        """Some rows that have ended, those that were run after their copies."""
        room = SOME
        while room > 0 and self._groups:
            group = self._groups[0]
            for row in islice(group.rows, room):
                room -= 1
                self.left -= 1
                yield self._copy(row, group.ended)
            if room > 0:
                self._groups.popleft()
                yield group.ended

    def _left(self, original: int) -> list[int]:
        return [row for row in self._plan.copies_of(original) if not self._done(self._plan.line(row))]

    def _tried(self, original: int, row: int) -> int:
        """Rows of a group that have failed, up to this one."""
        return 1 if row == original else 2 + self._plan.copies_of(original).index(row)

    def _more_patient(self, rows: list[int], limit: float | None) -> int | None:
        """Of these rows one that may run for longest, if that is longer than the limit [s] at which another failed."""
        best, most = None, math.inf if limit is None else limit
        for row in rows:
            own = self._feed.read(row)[2].body.timeout
            if own is None:
                return row
            if own > most:
                best, most = row, own
        return best

    def _run_instead(self, original: int, row: int) -> None:
        self._original[row] = original
        self._feed.lead(row)

    def _copy(self, row: int, ended: Ended) -> Ended:
        line, raw, spec = self._feed.read(row)
        stats = free_stats(ended) | {"copy_of": ended.line}
        return Ended(row, line, raw, spec, ended.answers, ended.error, stats, had=ended.had)


def free_stats(ended: Ended) -> dict[str, object]:
    """What is noted of a row that has the answers of `ended` without being computed: its usage, what it saved, and
    whether it repeats itself."""
    prompt, output = ended.stats["prompt_tokens"], ended.stats["completion_tokens"]
    assert isinstance(prompt, int)
    stats = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_saved": prompt * ended.spec.n}
    loop = ended.stats.get("loop_period")
    return stats if loop is None else stats | {"loop_period": loop}
