"""What all policies for live requests have in common: decodes, then prompts under way, then whoever waits.

It knows phases and asks an Admission for room; it must not know promises, costs or lengths.
"""

from __future__ import annotations

import math

from shoal.core.sequence import Sequence
from shoal.core.types import Finish
from shoal.sched.admission import Admission, Reserved, Watermark
from shoal.sched.policy import Budget, Key, Policy, Reach, View

DECODE, PREFILL, WAIT = 0.0, 1.0, 2.0
ALWAYS = 1 << 30  # plans


def phase(seq: Sequence) -> float:
    """Whether it decodes, computes its prompt, or waits."""
    if seq.ticket < 0:
        return WAIT
    return DECODE if len(seq.tokens) - seq.computed <= 1 else PREFILL


class Serving(Policy):
    """First come, first served within a phase; at most `items` prompts have a part in one step."""

    items: float = math.inf

    def __init__(self, limit: Budget | None = None, admission: Admission | None = None) -> None:
        super().__init__(limit)
        self.admission = admission or Watermark()
        self._items = 0  # prompts that have a part in this plan's step
        self._refused = False  # somebody, for want of memory
        self._tokens = self.limit.tokens  # of this plan's step

    def budget(self, view: View) -> Budget:
        """`tokens` of the step, and as many sequences as ever."""
        self.admission.look(view)
        self._items, self._refused = 0, False
        self._tokens = self.tokens(view)
        return Budget(self._tokens, self.limit.sequences)

    def tokens(self, view: View) -> int:
        """Tokens of the next step."""
        return self.limit.tokens

    def rank(self, seq: Sequence, view: View) -> Key:
        """By phase; ties go to arrival."""
        return phase(seq)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """Now, if its prompt may have a part in this step and there will be room for it."""
        if self._items >= self.items:
            return math.inf
        self._refused = not self.admission.fits(seq, reach, view)
        return math.inf if self._refused else -math.inf

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """As much as the step has room for; nothing of a prompt too many."""
        if len(seq.tokens) - seq.computed == 1:
            return 1
        pending = seq.pending
        if self._items >= self.items:
            return 0
        self._items += 1
        return min(pending, room)

    def steady(self, view: View) -> int:
        """For how many plans its answers lead to the same while all that runs decodes, and nothing comes or ends: a
        simulation need not ask meanwhile. Whoever waits may be let in by any of them; but where chance has no say and
        nobody has a place of another, what all hold only grows, and who was refused stays refused."""
        if len(view.running) > self.limit.sequences:
            return 0
        first = type(self).admit is Serving.admit and type(self).victim is Policy.victim
        certain = first and self._refused and isinstance(self.admission, Watermark | Reserved)
        return ALWAYS if not view.waiting or certain else 0

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Learn from answers that have come to their own end."""
        learns = finish in (Finish.STOP, Finish.LENGTH) and seq.samples
        (self.admission.learn if learns else self.admission.forget)(seq)
