"""Stall-free batching: prompts are computed in the time that decodes leave within a promised gap.

It knows promises and what steps cost; it must not know how long an answer will be.
Sarathi-Serve (OSDI 2024, arXiv 2403.02310).
"""

from __future__ import annotations

import math

from shoal.core.types import Promise
from shoal.sched.admission import Admission
from shoal.sched.budgeting import Budgets
from shoal.sched.cost import Cost
from shoal.sched.policies.serving import Serving
from shoal.sched.policy import Budget, View

NOTHING = Promise()


class StallFree(Serving):
    """All decodes in every step, and of prompts what fits into a budget of tokens in whole tiles.

    The budget is `fixed`, or else the best that keeps the tightest promise among the sequences that decode: offline
    work alone is not held to what was promised to live requests. Requests without a promise of their own have
    `promise`. When nothing decodes, nothing can stall, and prompts are cut at the limit alone.
    """

    def __init__(
        self, limit: Budget | None = None, admission: Admission | None = None, cost: Cost | None = None,
        promise: Promise | None = None, tile: int = 64, fixed: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(limit or Budget(8192, 128), admission)
        self.promise, self.tile, self.fixed = promise or NOTHING, tile, fixed
        self._budgets = Budgets(cost, tile, self.limit.tokens) if cost else None

    def tokens(self, view: View) -> int:
        """The budget of the step, more than the decodes in any case."""
        decodes = context = 0
        default = self.promise.gap
        tightest = math.inf
        for seq in view.running:
            size = len(seq.tokens)
            if size - seq.computed <= 1:
                decodes += 1
                context += size
                promise = seq.request.promise
                gap = default if promise is None else promise.gap
                if gap < tightest:
                    tightest = gap
        if not decodes:
            return self.limit.tokens
        if self.fixed is not None:
            return max(self.fixed, (decodes // self.tile + 1) * self.tile)
        if self._budgets is None:
            return self.limit.tokens
        context //= decodes
        return self._budgets.tokens(tightest, decodes, context, self._depth(view, context))

    def steady(self, view: View) -> int:
        """A budget is more than the decodes, so each has its token whatever it is; but what waits may begin when it
        grows or shrinks with them."""
        return 0 if view.waiting and self._budgets is not None else super().steady(view)

    def _depth(self, view: View, otherwise: int) -> int:
        """Tokens before the chunk of the first prompt under way: it takes what the decodes leave."""
        prompts = [seq for seq in view.running if len(seq.tokens) - seq.computed > 1]
        if not prompts:
            return otherwise  # whoever is let in may find some of its prompt: nobody knows how much
        return min(prompts, key=lambda seq: (self.rank(seq, view), seq.number)).computed
