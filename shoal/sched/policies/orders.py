"""Orders: the best few of all that live have the step, whoever runs already; the others keep their memory and stand.

It knows deadlines, expected lengths and what was spent on a program; it must not know true lengths. The controls of
JITServe (arXiv 2504.20068): shortest first as predicted, earliest deadline first, least attained service.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Promise
from shoal.sched.admission import Admission, Foreseen, would_make_room
from shoal.sched.cost import Cost
from shoal.sched.lengths import LengthEstimator, LengthHistory
from shoal.sched.policies.serving import DECODE, PREFILL, WAIT
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget, Key, Reach, View

FEW, STALE = 128, 4  # sequences above which an order is made in every fourth plan: whoever comes waits for three
REFRESH = 50  # tokens after which a sequence's expected length is asked anew


class Ordered(StallFree):
    """Stall-free steps of the `limit.sequences` that `score` puts first.

    A sequence that is not among them keeps its keys and values, which is cheaper than to compute them again; a chosen
    one that waits takes them from such, the last first, `swaps` times in one plan at most.
    """

    swaps = 2

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        lengths: LengthEstimator | None = None, admission: Admission | None = None,
    ) -> None:  # fmt: skip
        self.lengths = lengths or LengthHistory()
        super().__init__(limit or Budget(8192, 32), admission or Foreseen(), cost, promise)
        self._chosen: dict[int, float] = {}  # by number: places, the best first; empty when all are served
        self._swapped = self._plans = 0
        self._seats = self.limit.sequences  # places that have a part in the step: those of the ended go to the next
        self._expected: dict[int, tuple[int, int]] = {}  # by number: tokens at which it is asked again, and the length

    def score(self, seq: Sequence, view: View) -> float:
        """Smallest first; ties to arrival."""
        raise NotImplementedError

    def choose(self, view: View) -> list[Sequence]:
        """Who is in the step if there is room, the best first."""
        return sorted((*view.running, *view.waiting), key=lambda seq: (self.score(seq, view), seq.number))

    def budget(self, view: View) -> Budget:
        """The choice is made once, for the whole plan; of many, for the next ones as well."""
        self._swapped = 0
        self._plans += 1
        if len(view.running) + len(view.waiting) <= FEW or self._plans % STALE == 0:
            self._chosen = {seq.number: float(at) for at, seq in enumerate(self.choose(view))}
            self._seats = self.limit.sequences
        return super().budget(view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """Those within the limit, decodes first; then the others in their order."""
        at = self._chosen.get(seq.number, math.inf)
        if at >= self._seats:
            return 1.0, 0.0, at
        return 0.0, (WAIT if seq.ticket < 0 else DECODE if len(seq.tokens) - seq.computed <= 1 else PREFILL), at

    def stands(self, seq: Sequence) -> bool:
        """Whether it has no place in this plan."""
        return self._chosen.get(seq.number, math.inf) >= self._seats

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """If there is room; or somebody stands in its place, and not too many have lost theirs already."""
        if super().admit(seq, reach, view) <= view.now:
            return -math.inf
        if self.stands(seq) or self._swapped >= self.swaps:
            return math.inf
        standing = [other for other in view.running if self.stands(other) and other.yields]
        standing.sort(key=lambda other: self._chosen.get(other.number, math.inf))
        last = standing[self._swapped - self.swaps :]
        return -math.inf if would_make_room(last, seq, reach, view) else math.inf

    def victim(self, seq: Sequence, others: Seq[Sequence], view: View) -> Sequence | None:
        """The last; for one that waits, only if it stands."""
        if not others:
            return None
        if seq.ticket >= 0:
            return others[-1]
        if self._swapped >= self.swaps or not self.stands(others[-1]):
            return None
        self._swapped += 1
        return others[-1]

    def expected(self, seq: Sequence, share: float = 0.5) -> int:
        """Its expected length, asked every so many tokens."""
        again, length = self._expected.get(seq.number, (0, 0))
        produced = len(seq.tokens) - seq.num_prompt
        if produced >= again or produced >= length:
            length = self.lengths.quantile(seq, share)
            self._expected[seq.number] = produced + REFRESH, length
        return length

    def steady(self, view: View) -> int:
        """Never: which plans make an order, and when a length is asked anew, is counted in plans and tokens."""
        return 0

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Learn, and forget what was expected."""
        super().retire(seq, finish, view)
        self._expected.pop(seq.number, None)
        self._seats += self._chosen.pop(seq.number, math.inf) < self._seats
        (self.lengths.learn if finish in (Finish.STOP, Finish.LENGTH) and seq.samples else self.lengths.forget)(seq)


class ShortestFirst(Ordered):
    """Whoever is expected to have least left."""

    def score(self, seq: Sequence, view: View) -> float:
        """Tokens left, of the prompt as of the answer."""
        return self.expected(seq) - seq.produced + seq.pending


def due(seq: Sequence, default: Promise) -> float:
    """When its next token, or else its whole answer, is due [s]."""
    request = seq.request
    if request.deadline < math.inf:
        return request.deadline
    promise = request.promise or default
    produced = len(seq.tokens) - seq.num_prompt
    return request.arrival + promise.first + (produced * promise.gap if produced else 0.0)


class EarliestDeadline(Ordered):
    """Whoever's next promise is due first, kept or not."""

    def score(self, seq: Sequence, view: View) -> float:
        """When it is due."""
        return due(seq, self.promise)


class LeastAttained(Ordered):
    """Whoever's program has had least, in levels of `quantum` tokens (Autellix, arXiv 2502.13965)."""

    quantum = 400
    most = 10_000  # programs that are followed at once

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        lengths: LengthEstimator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(limit, cost, promise, lengths)
        self._attained: dict[str, int] = {}  # by program, of turns that have ended

    def score(self, seq: Sequence, view: View) -> float:
        """The level."""
        before = self._attained.get(seq.request.program, 0)
        return (before + seq.computed) // self.quantum

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """What it has had is its program's."""
        super().retire(seq, finish, view)
        program = seq.request.program
        if program:
            self._attained[program] = self._attained.pop(program, 0) + len(seq.tokens)
            if len(self._attained) > self.most:  # the one whose last turn ended longest ago begins anew
                del self._attained[next(iter(self._attained))]

    def hear(self, program: str, tool: str, now: float) -> None:
        """A program that has ended is forgotten."""
        if not tool:
            self._attained.pop(program, None)
