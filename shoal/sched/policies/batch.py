"""Offline batches: the plan's order, as many rows at once as memory will hold to their end, no preemption.

It knows plan indices and learnt lengths; it must not know a true length, nor what the rows are about.
BatchLLM (arXiv 2412.03594): order by plan and batch by memory instead of by count. Past-Future (arXiv 2507.10150):
admission by the predicted peak.
"""

from __future__ import annotations

import math
from itertools import chain

from shoal.core.sequence import Sequence
from shoal.core.types import Finish
from shoal.kv.tree import NEVER, Node
from shoal.sched.forecast import Growth, MemoryForecast
from shoal.sched.lengths import LengthHistory
from shoal.sched.policy import Budget, Key, Policy, Reach, View

STEP_COST = 32  # tokens whose computation takes as long as a step that has little else to do
FEW = 256  # waiting rows up to which what waits is taken for all that is left
RELEARN = 32  # finished rows after which expectations are asked anew


class BatchPolicy(Policy):
    """Running rows first, decodes before prefill chunks; then waiting rows in plan order while the peak fits."""

    def __init__(self, limit: Budget | None = None, reserve: float = 0.05) -> None:
        super().__init__(limit or Budget(2048, 512))
        self.reserve = reserve  # share of memory kept free while lengths are uncertain
        self.lengths = LengthHistory()
        self._expected: dict[int, int] = {}  # by number, of running sequences
        self._finished = 0
        self._base = 0
        self._growths: list[Growth] = []
        self._certain = True
        self._tokens = self.limit.tokens  # of this plan's step
        self._backlog = 0  # prompt tokens of running sequences that are not computed yet
        self._pace = 1  # prompt tokens a step has room for beside the decodes
        self._fresh = False

    def budget(self, view: View) -> Budget:
        """The forecast of this plan starts anew; it is made when the first candidate asks."""
        self._fresh = False
        self._tokens = self._enough(view)
        return Budget(self._tokens, self.limit.sequences)

    def _enough(self, view: View) -> int:
        """Tokens of a step such that prompts are computed beside decodes that would not fill it.

        The longest answer takes its steps whatever is done; near the end of a job, when few rows decode, a step reads
        all weights for little. So a prompt is put off as far as its own answer leaves time: it must be computed when
        as many steps are left as that has tokens. Only where all lengths are certain, and all that waits is in sight.
        """
        most = self.limit.tokens
        decodes = sum(seq.pending <= 1 for seq in view.running)
        if len(view.waiting) > FEW or decodes == len(view.running) + len(view.waiting):
            return most
        if decodes >= 4 * STEP_COST or any(seq.stop for seq in chain(view.running, view.waiting)):
            return most
        left = max(_left(seq) for seq in chain(view.running, view.waiting))
        behind = [seq for seq in view.running if seq.pending > 1]
        behind += sorted(view.waiting, key=lambda seq: seq.request.index)
        tokens, pace = 0, 0.0
        for seq in behind:
            tokens += seq.pending
            pace = max(pace, tokens / (left - _left(seq) + 1))
        return min(most, max(decodes + math.ceil(pace), STEP_COST))

    def steady(self, view: View) -> int:
        """With nobody waiting there is nothing to decide while all decode."""
        return 0 if view.waiting else NEVER

    def rank(self, seq: Sequence, view: View) -> Key:
        """Decodes, then prefills under way, then the plan's order. Rows without a plan come in order of arrival."""
        if seq.ticket < 0:
            return 2.0, float(seq.request.index)
        return (0.0 if len(seq.tokens) - seq.computed <= 1 else 1.0), float(seq.request.index)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """Now, if the predicted peak with it fits in memory; else when something has changed."""
        if not self._fresh:
            self._look(view, reach.reserved_blocks)
        future = seq.request.future
        deepest = -(-future[0][0] // view.block_size) if future else 0
        shared = max(reach.blocks, deepest)
        expected = self._expect(seq)
        prefill = self._backlog + len(seq.tokens) - reach.tokens
        remaining = expected - seq.produced + prefill // self._pace
        growth = Growth(remaining, len(seq.tokens), shared)
        base = self._base + reach.idle_blocks + shared - reach.blocks
        forecast = MemoryForecast(view.block_size)
        certain = self._certain and not seq.stop
        room = view.num_blocks * (1.0 if certain else 1.0 - self.reserve)
        peak = forecast.peak(base, [*self._growths, growth])
        if peak > room or self._better_later(peak, reach, view):
            return math.inf
        self._growths.append(growth)
        self._base, self._certain, self._backlog = base, certain, prefill
        return -math.inf

    def _better_later(self, peak: float, reach: Reach, view: View) -> bool:
        """Whether starting now would forget an idle prefix that is needed before one that a running row still holds.

        Belady's choice would be the latter: it becomes possible when that row ends. (With several rows running, most
        of a small memory is held, and the choice among the rest is hardly better than the least recently used.)
        """
        have = view.used_blocks + view.free_blocks + reach.reserved_blocks + reach.idle_blocks
        lose = math.ceil(peak) - have
        if lose <= 0:
            return False
        missed = reach.loss(lose)
        if missed == NEVER:
            return False
        top = max((seq.request.index for seq in view.running), default=-1)
        worth_waiting = lose * view.block_size / STEP_COST  # steps
        for seq in view.running:
            later = any(index > max(top, missed) for _, index in seq.request.future or ())
            if later and self._expected.get(seq.number, 0) - seq.produced < worth_waiting:
                return True
        return False

    def _look(self, view: View, reserved: int) -> None:
        """Describe the running sequences to the forecast."""
        private = backlog = 0
        self._pace = max(self._tokens - len(view.running), 1)
        growths, certain = [], True
        for seq in view.running:
            expected = self._expected.get(seq.number, 0)
            produced = len(seq.tokens) - seq.num_prompt
            if expected <= produced:
                expected = self._expect(seq)
            remaining = max(expected - produced, 0)
            pending = seq.pending
            if pending > 1:  # it decodes only when its prompt, and those before it, are computed
                backlog += pending
                remaining += backlog // self._pace
            growths.append(Growth(remaining, len(seq.tokens), seq.private_from))
            private += max(len(seq.blocks) - seq.private_from, 0)
            certain = certain and not seq.stop
        self._backlog = backlog
        self._base = max(view.used_blocks - private, 0) + reserved
        self._growths, self._certain, self._fresh = growths, certain, True

    def _expect(self, seq: Sequence) -> int:
        expected = self._expected[seq.number] = self.lengths.expect(seq)
        return expected

    def worth(self, node: Node) -> float:
        """What is needed soonest is worth most; a block that its users only branch off in is worth less than any
        whole one, for others like it begin with the same tokens; what nobody knows a use for yields first."""
        if node.next_use == NEVER:
            return -math.inf
        return -float(node.next_use) - (NEVER if node.branches else 0)

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Learn from its length."""
        self._expected.pop(seq.number, None)
        if finish in (Finish.STOP, Finish.LENGTH) and seq.samples:
            self.lengths.observe(seq.request.group, seq.produced)
            self._finished += 1
            if self._finished % RELEARN == 0:
                self._expected.clear()


def _left(seq: Sequence) -> int:
    """Tokens that a sequence whose length is certain has still to produce."""
    return max(seq.request.sampling.max_tokens - seq.produced, 0) if seq.samples else 0
