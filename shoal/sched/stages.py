"""How long the stages of programs take, and so when the stage that runs now has to be done.

It knows when turns came and went, by kind of program; it must not know how a running program will go on.
JITServe (arXiv 2504.20068) matches what is seen of a program with the graphs of earlier ones. Here a stage is a set of
calls that overlap, and of a graph is kept how long each stage and the pause after it took.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

COLD = 0.5  # share of what is left that a stage gets when nothing is known: as many stages again may follow


@dataclass(slots=True)
class _Program:
    kind: str
    begins: list[float] = field(default_factory=list)  # of stages
    ends: list[float] = field(default_factory=list)
    live: int = 0  # calls of the stage that have not ended


class Stages:
    """The last `keep` finished programs of each kind; `like` of them, those that began most alike, are asked."""

    def __init__(self, keep: int = 64, like: int = 8, most: int = 4096) -> None:
        self.keep, self.like, self.most = keep, like, most  # `most` programs are followed: the others never said more
        self._live: dict[str, _Program] = {}
        self._past: dict[str, deque[list[tuple[float, float]]]] = {}  # by kind: (stage, pause after it) [s]

    def arrive(self, program: str, kind: str, now: float) -> None:
        """A call of the program has come: a new stage, unless another call of it runs."""
        found = self._live.setdefault(program, _Program(kind))
        if len(self._live) > self.most:
            del self._live[next(iter(self._live))]
        if not found.live:
            found.begins.append(now)
        found.live += 1

    def leave(self, program: str, now: float) -> None:
        """A call of it has ended."""
        found = self._live.get(program)
        if found is None or not found.live:
            return
        found.live -= 1
        if not found.live:
            found.ends.append(now)

    def end(self, program: str) -> None:
        """The program has ended: it is an example from now on."""
        found = self._live.pop(program, None)
        if found is None or not found.ends or found.live:
            return
        pauses = [later - end for end, later in zip(found.ends, found.begins[1:], strict=False)] + [0.0]
        stages = [end - begin for begin, end in zip(found.begins, found.ends, strict=True)]
        past = self._past.setdefault(found.kind, deque(maxlen=self.keep))
        past.append(list(zip(stages, pauses, strict=True)))

    def due(self, program: str, deadline: float) -> float:
        """When the running stage has to be done so that what may follow has its share of the time to the deadline."""
        found = self._live.get(program)
        if found is None or not found.begins or math.isinf(deadline):
            return deadline
        at, begin = len(found.begins) - 1, found.begins[-1]
        return begin + (deadline - begin) * self._share(found, at)

    def _share(self, found: _Program, at: int) -> float:
        examples = [past for past in self._past.get(found.kind, ()) if len(past) > at]
        if not examples:
            return 1.0 if self._past.get(found.kind) else COLD
        seen = [end - begin for begin, end in zip(found.begins, found.ends, strict=False)][:at]

        def unlike(past: list[tuple[float, float]]) -> float:
            return sum(abs(math.log1p(a) - math.log1p(b)) for a, (b, _) in zip(seen, past, strict=False))

        nearest = sorted(examples, key=unlike)[: self.like]
        shares = [past[at][0] / max(sum(map(sum, past[at:])), 1e-9) for past in nearest]
        return min(1.0, max(sum(shares) / len(shares), 0.01))
