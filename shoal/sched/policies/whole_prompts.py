"""Batches of whole prompts, as servers made them before prompts were cut: what stall-free batching is measured against.

It knows phases and memory; it must not know promises or lengths. After vLLM (SOSP 2023, arXiv 2309.06180), Orca (OSDI
2022) and FasterTransformer, each by its rule and not by its code.
"""

from __future__ import annotations

import math

from shoal.core.sequence import Sequence
from shoal.sched.admission import Admission, Reserved
from shoal.sched.policies.serving import DECODE, PREFILL, WAIT, Serving
from shoal.sched.policy import Budget, Key, Reach, View


class _WholePrompts(Serving):
    """A prompt is computed in one step; one that no step has room for, alone and in as few as it takes."""

    def __init__(self, limit: Budget | None = None, admission: Admission | None = None) -> None:
        super().__init__(limit, admission)
        self._room = 0  # tokens that prompts may still take of this plan's step
        self._prompts = False  # whether the step has any

    def budget(self, view: View) -> Budget:
        """The step is empty."""
        budget = super().budget(view)
        self._room, self._prompts = budget.tokens, False
        return budget

    def steady(self, view: View) -> int:
        """Decodes alone are neither cut nor counted."""
        return super().steady(view)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """If all of its prompt that is not there already fits into the step, or the step is its own."""
        new = len(seq.tokens) - reach.tokens
        if (new > self._room and self._prompts) or super().admit(seq, reach, view) > view.now:
            return math.inf
        return -math.inf

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """All of a prompt or nothing, but where it has the step for itself."""
        pending = seq.pending
        if pending <= 1:
            return min(pending, room)
        if pending > room and self._prompts:
            return 0
        self._prompts = True
        self._room = room - pending
        return min(pending, room)


class PrefillFirst(_WholePrompts):
    """vLLM's: whoever waits goes first, in steps of prompts alone; all others stand still meanwhile."""

    def steady(self, view: View) -> int:
        """Decodes stand beside prompts alone."""
        return super().steady(view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """Prompts under way, then those that wait, then decodes."""
        if seq.ticket < 0:
            return 1.0
        return 2.0 if len(seq.tokens) - seq.computed <= 1 else 0.0

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """No decode beside a prompt."""
        return 0 if seq.pending <= 1 and self._prompts else super().chunk(seq, room, view)


class Hybrid(_WholePrompts):
    """Orca's: prompts join the decodes of a step whole, and memory is reserved to the longest possible answer."""

    def __init__(self, limit: Budget | None = None) -> None:
        super().__init__(limit or Budget(16384, 16), Reserved())

    def steady(self, view: View) -> int:
        """Seats are counted when somebody is let in."""
        return super().steady(view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """Whoever runs, then whoever waits."""
        return DECODE if seq.ticket >= 0 else WAIT

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """While there are seats."""
        return math.inf if len(view.running) >= self.limit.sequences else super().admit(seq, reach, view)


class RequestLevel(_WholePrompts):
    """FasterTransformer's: a batch is formed when the one before has ended, and nobody joins it."""

    def __init__(self, limit: Budget | None = None) -> None:
        super().__init__(limit or Budget(16384, 16), Reserved())

    def steady(self, view: View) -> int:
        """A batch that runs is left alone."""
        return super().steady(view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """Prompts of the batch, then its decodes, then whoever waits."""
        if seq.ticket < 0:
            return WAIT
        return PREFILL if len(seq.tokens) - seq.computed <= 1 else DECODE

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """Only into an empty machine."""
        return math.inf if view.running else super().admit(seq, reach, view)
