"""Policies that try to break the scheduler, and some that are merely odd. Test fixtures; none is a good idea."""

from __future__ import annotations

import math
import random

from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy


class Shortest(Policy):
    def rank(self, seq, view):
        return float((seq.request.guess or 64) - seq.produced)


class SmallChunks(Policy):
    def chunk(self, seq, room, view):
        return min(7, seq.pending, room)


class Speculate(Policy):
    def draft(self, seq, view):
        return 3


class Reverse(Policy):
    """Later requests first, so that everybody is preempted by those who come after."""

    def rank(self, seq, view):
        return float(-seq.number)


class Steal(Policy):
    """Preempts as much as it can, also for sequences that only wait."""

    def victim(self, seq, others, view):
        return others[-1] if others else None


class Starve(Policy):
    """The smallest budget there is."""

    def budget(self, view):
        return Budget(tokens=1, sequences=1)


class RefuseAll(Policy):
    """Never lets anybody start, never wants to compute anything, and offers victims that are none of its business."""

    def budget(self, view):
        return Budget(tokens=0, sequences=0)

    def admit(self, seq, reach, view):
        return math.inf

    def chunk(self, seq, room, view):
        return 0

    def victim(self, seq, others, view):
        return seq


class Chaos(Policy):
    """Answers every question by rolling dice."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = random.Random(5)

    def budget(self, view):
        return Budget(self.dice.randrange(0, 90), self.dice.randrange(0, 9))

    def admit(self, seq, reach, view):
        return self.dice.choice([-math.inf, view.now + 0.01, math.inf])

    def rank(self, seq, view):
        return self.dice.random()

    def chunk(self, seq, room, view):
        return self.dice.randrange(-2, 2 * room + 1)

    def draft(self, seq, view):
        return self.dice.randrange(-1, 4)

    def victim(self, seq, others, view):
        return self.dice.choice([None, seq, *others])

    def worth(self, node):
        return self.dice.random()


class Restless(Policy):
    """Changes its mind about what every block is worth in every plan, also of blocks that are long gone or in use."""

    def __init__(self) -> None:
        super().__init__()
        self.dice, self.seen = random.Random(6), []

    def worth(self, node):
        self.seen = [*self.seen[-40:], node]
        return self.dice.random()

    def revalued(self, view):
        return [*self.seen, *self.seen]


class Level(Policy):
    """Whoever has produced least goes first, so that two rows overtake each other with every token."""

    def rank(self, seq, view):
        return float(seq.produced)


class Robber(Policy):
    """Whoever has computed least goes first, in small pieces, and takes from who has computed most."""

    def rank(self, seq, view):
        return float(seq.computed)

    def chunk(self, seq, room, view):
        return min(5, seq.pending, room)

    def victim(self, seq, others, view):
        return max(others, key=lambda other: other.computed, default=None)


class SmallBatch(BatchPolicy):
    def __init__(self) -> None:
        super().__init__(Budget(24, 16))


EVERY = [
    Policy, BatchPolicy, SmallBatch, Shortest, SmallChunks, Speculate, Reverse, Steal, Level, Robber, Starve,
    RefuseAll, Chaos, Restless,
]  # fmt: skip
