"""Just-in-time service: each promise gets what it needs to be kept and no more, the rest goes where it is worth most.

It knows promises, deadlines and upper bounds of lengths; it must not know true lengths, nor how a program goes on.
JITServe (NSDI 2026, arXiv 2504.20068): margins of time against minimum bandwidth, and groups of like lengths among
sequences of like worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from itertools import accumulate

from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Promise
from shoal.sched.admission import Admission
from shoal.sched.cost import Cost
from shoal.sched.lengths import LengthEstimator
from shoal.sched.policies.orders import Ordered
from shoal.sched.policy import Budget, View
from shoal.sched.quantiles import QuantileForest
from shoal.sched.stages import Stages

BOUND = 0.95  # share of answers that are not longer than their bound
PER_OUTPUT = 8.0  # what a token of an answer is worth in tokens of a prompt
SHARPNESS = 4.0  # how fast worth falls when less time is left than the bound needs
HOPELESS = 0.02  # chance below which a promise is taken for broken
STEADY = 1.2  # by so much must a newcomer be worth more than one that is in the step already
PATIENCE = 4.0  # times as long as it needs that a broken promise waits behind what nothing was promised to
PROMISED, BROKEN, AGED, LEFTOVER, MISSED, PLANNED = range(6)

Ranked = tuple[float, float, Sequence]  # worth, length, whose


def like_lengths(ranked: Seq[Ranked], size: int, slack: float) -> list[Sequence]:
    """GMAX: among those worth at least (1 - slack) of the `size`-th, by falling worth, the `size` that are neighbours
    in length and worth most together; then all others as they came."""
    if len(ranked) <= size or size <= 0 or slack <= 0.0:
        return [entry[2] for entry in ranked]
    cut = ranked[size - 1][0]
    cut -= slack * abs(cut)
    near = sorted((entry for entry in ranked if entry[0] >= cut), key=lambda entry: (entry[1], entry[2].number))
    sums = [0.0, *accumulate(entry[0] for entry in near)]
    begin = max(range(len(near) - size + 1), key=lambda i: (sums[i + size] - sums[i], -i))
    window = {entry[2].number for entry in near[begin : begin + size]}
    inside = [entry[2] for entry in ranked if entry[2].number in window]
    return inside + [entry[2] for entry in ranked if entry[2].number not in window]


class JustInTime(Ordered):
    """Requests with a promise want their tokens in time; those with a deadline their end; those of a program with a
    deadline their stage's end. What has none of these, and what can no longer be kept, lives on what is left over,
    and rows of a batch, in their plan's order, on what those leave. What can no longer be kept stands behind what was
    promised nothing until it has waited long enough; once its late token has come, the next is due a gap later again,
    after what can still be kept from the first token to the last.

    What is promised is ordered by its worth for each second that it still needs, less the more time there is to spare:
    so whoever is ahead waits, and nothing is spent on what will be late anyway. Whoever is in the step keeps its place
    against newcomers that are hardly worth more.
    """

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        lengths: LengthEstimator | None = None, admission: Admission | None = None, slack: float = 0.1,
    ) -> None:  # fmt: skip
        """`slack`: share of worth that may be given up to bring like lengths together; 0 does not."""
        super().__init__(limit, cost, promise, lengths or QuantileForest(), admission)
        self.slack = slack
        self._stages = Stages()
        self._seen: dict[int, tuple[int, float]] = {}  # by number: tokens produced when last looked, and since when
        self._late: dict[int, float] = {}  # by number: seconds by which a token came too late: its next ones may too
        self._missed: dict[int, float] = {}  # by number: since when it cannot be kept
        self._step = 0.02  # seconds of a step: a moving mean
        self._before: float | None = None  # when the plan before was made, if it left a step running

    # -- what is known of a sequence ---------------------------------------------------------------

    def budget(self, view: View) -> Budget:
        """The same, with an eye on how long steps take."""
        if self._before is not None and view.now > self._before:
            self._step += 0.1 * (min(view.now - self._before, 10 * self._step) - self._step)
        self._before = view.now if view.running else None
        return super().budget(view)

    def _look(self, view: View) -> None:
        """Take down who has come."""
        for seq in view.waiting:
            if seq.number not in self._seen:
                self._seen[seq.number] = 0, view.now
                if seq.request.program:
                    self._stages.arrive(seq.request.program, seq.request.group, view.now)

    def _last_token(self, seq: Sequence, now: float) -> float:
        produced, since = self._seen.get(seq.number, (0, now))
        if len(seq.tokens) - seq.num_prompt != produced:
            produced, since = len(seq.tokens) - seq.num_prompt, now
            self._seen[seq.number] = produced, since
            promise = seq.request.promise or self.promise
            late = now - self._turn(seq, promise, produced - 1)
            if late > 0.0:
                self._late[seq.number] = late + self._late.get(seq.number, 0.0)
        return since

    def _turn(self, seq: Sequence, promise: Promise, at: int) -> float:
        """When its token `at` is due, counted from the last one that came too late."""
        gaps = at * promise.gap if at else 0.0
        return seq.request.arrival + promise.first + self._late.get(seq.number, 0.0) + gaps

    def margin(self, seq: Sequence, view: View) -> tuple[float, float, float]:
        """(seconds to spare, seconds it needs, those it needs until its next promise), all of it running in every
        step; infinite where nothing was promised."""
        request, step, now = seq.request, self._step, view.now
        produced, pending = len(seq.tokens) - seq.num_prompt, seq.pending
        prompt = pending / max(self._tokens, 1) if pending > 1 else 0.0
        whole = (prompt + max(self.expected(seq, BOUND) - produced, 1)) * step
        if request.deadline < math.inf:
            due = self._stages.due(request.program, request.deadline) if request.program else request.deadline
            return due - now - whole, whole, whole
        promise = request.promise or self.promise
        if math.isinf(promise.first) and math.isinf(promise.gap):
            return math.inf, whole, whole
        own = (prompt + 1.0) * step
        due = request.arrival + promise.first
        if produced:  # no token later than its turn, and no gap longer than promised though others came early
            since = self._last_token(seq, now)
            due = min(self._turn(seq, promise, produced), since + promise.gap)
        return due - now - own, whole, own

    def judge(self, seq: Sequence, view: View) -> tuple[int, float]:
        """(which group it is in, what it is worth for each second it still needs, more the less there is to spare)."""
        spare, whole, own = self.margin(seq, view)
        value = (seq.num_prompt + PER_OUTPUT * self.expected(seq, BOUND)) / whole
        if math.isinf(spare):
            index = seq.request.index
            return (LEFTOVER, value) if index < 0 else (PLANNED, -float(index))
        chance = 1.0 if spare >= 0.0 else max((spare + own) / own, 0.0) ** SHARPNESS
        if chance < HOPELESS:
            since = self._missed.setdefault(seq.number, view.now)
            return (AGED if view.now - since > PATIENCE * whole else MISSED), value
        self._missed.pop(seq.number, None)
        if seq.number in self._chosen and not self.stands(seq):
            value *= STEADY
        return (BROKEN if seq.number in self._late else PROMISED), value * chance / (1.0 + max(spare, 0.0) / whole)

    # -- answers -----------------------------------------------------------------------------------

    def choose(self, view: View) -> list[Sequence]:
        """By group, then by worth, with the last of those that find room next to others of their length."""
        self._look(view)
        groups: dict[int, list[Ranked]] = {group: [] for group in range(PLANNED + 1)}
        for seqs in (view.running, view.waiting):
            for seq in seqs:
                group, value = self.judge(seq, view)
                groups[group].append((value, float(len(seq.tokens)), seq))
        found: list[Sequence] = []
        for group, ranked in groups.items():
            ranked.sort(key=lambda entry: (-entry[0], entry[2].number))
            slack = 0.0 if group == PLANNED else self.slack  # rows that share a prefix stand together in their plan
            found += like_lengths(ranked, self.limit.sequences - len(found), slack)
        return found

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Learn its length, and how long its stage took."""
        super().retire(seq, finish, view)
        came = self._seen.pop(seq.number, None)
        self._late.pop(seq.number, None)
        self._missed.pop(seq.number, None)
        if seq.request.program and came is not None:
            self._stages.leave(seq.request.program, view.now)

    def hear(self, program: str, tool: str, now: float) -> None:
        """A program that has ended is an example for those like it."""
        if not tool:
            self._stages.end(program)
