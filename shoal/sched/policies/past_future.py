"""Past-Future admission: who starts now is decided by the memory that all will need at the worst moment to come.

It knows lengths of the past, and draws those of the future from them; it must not know any true one.
LightLLM's scheduler (ASPLOS 2025, arXiv 2507.10150).
"""

from __future__ import annotations

import math

from shoal.core.sequence import Sequence
from shoal.core.types import Promise
from shoal.sched.admission import Foreseen
from shoal.sched.cost import Cost
from shoal.sched.lengths import LengthEstimator, LengthHistory
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget, Reach, View


class PastFuture(StallFree):
    """First come, first served; the newest gives up its memory where the draw was wrong, and comes back first.

    `condition=False` draws lengths as if nothing had been produced yet: the paper's control. Candidates are asked
    about in one step of `every` (the paper's has 10 for the sake of its pace), and at once when nothing runs.
    """

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        lengths: LengthEstimator | None = None, window: int = 200, reserve: float = 0.05, condition: bool = True,
        every: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        lengths = lengths or LengthHistory(window, condition=condition, cold=True)
        super().__init__(limit, Foreseen(lengths, reserve, seed), cost, promise)
        self.every = every
        self._plans = 0

    def budget(self, view: View) -> Budget:
        """The same, with the plans counted."""
        self._plans += 1
        return super().budget(view)

    def steady(self, view: View) -> int:
        """Until candidates are asked about again."""
        return self.every - 1 - self._plans % self.every if view.waiting else super().steady(view)

    def skipped(self, plans: int) -> None:
        """They count too."""
        self._plans += plans

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """When its turn to be asked about has come, and the peak leaves room."""
        if view.running and self._plans % self.every:
            return math.inf
        return super().admit(seq, reach, view)
