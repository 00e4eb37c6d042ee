"""Admission by what is held now, or by what may be held at most: what foresight is measured against.

It knows memory and limits; it must not know how long answers tend to be. The controls of Past-Future (arXiv
2507.10150): vLLM's watermark, and the reservation of TGI and others.
"""

from __future__ import annotations

from shoal.core.types import Promise
from shoal.sched.admission import Reserved, Watermark
from shoal.sched.cost import Cost
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget


class Aggressive(StallFree):
    """Whoever's prompt fits now starts, and the newest pay for it later."""

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        share: float = 0.99,
    ) -> None:  # fmt: skip
        super().__init__(limit, Watermark(share), cost, promise)


class Conservative(StallFree):
    """Whoever's longest possible answer fits beside those of all others starts, and nobody ever pays."""

    def __init__(self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None) -> None:
        super().__init__(limit, Reserved(), cost, promise)
