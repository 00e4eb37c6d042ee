"""Live requests get just enough, and batch jobs what is left: of each step's time, and of memory.

It knows promises, tenants, windows of jobs and what steps cost; it must not know true lengths.
After Sarathi-Serve's budget (arXiv 2403.02310) and JITServe's residual capacity (arXiv 2504.20068), with the virtual
counters of fair queueing between tenants (VTC, arXiv 2401.00588).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Promise
from shoal.sched.admission import Admission, Foreseen, would_make_room
from shoal.sched.cost import Cost
from shoal.sched.outlook import Job, Lateness, Outlook
from shoal.sched.policies.serving import DECODE, PREFILL, WAIT
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget, Key, Reach, View

BATCH = 10.0  # added to the phase of what belongs to a batch
PATIENT = 0.25  # of the time to a first token, the share that a step of batch work alone may take: one may just arrive


def is_batch(seq: Sequence) -> bool:
    """A request that was promised nothing belongs to a batch; its group is its tenant."""
    return seq.request.promise is None


class Mixed(StallFree):
    """Live requests first in all they ask for; batch rows fill the step up to its budget and are the first to stand
    or to lose their memory.

    A step lasts no longer than the tightest gap that was promised to whoever decodes; with batch work alone, no longer
    than a part of `promise.first`, so that whoever comes finds the machine free soon. Tenants share what is left by
    the tokens they have had, over their `weights`. A job with a window in `jobs` that is behind its even pace decodes
    beside live requests instead of after them; what cannot be met is said in `announced` a quarter of the window
    ahead, if the pace until then tells.
    """

    most = 10_000  # tenants that are remembered

    def __init__(
        self, limit: Budget | None = None, cost: Cost | None = None, promise: Promise | None = None,
        admission: Admission | None = None, jobs: Mapping[str, Job] | None = None,
        weights: Mapping[str, float] | None = None, tile: int = 64,
    ) -> None:  # fmt: skip
        super().__init__(limit, admission or Foreseen(), cost, promise, tile)
        self.weights = dict(weights or {})
        self.announced: list[Lateness] = []
        self._outlooks = {group: Outlook(group, job) for group, job in (jobs or {}).items()}
        self._ended: dict[str, float] = {}  # by tenant: tokens of rows that have ended
        self._served: dict[str, float] = {}  # by tenant that is there: … and of those that run, over its weight
        self._ahead: dict[str, float] = {}  # by tenant: what was added to it when it came
        self._urgent: set[str] = set()  # tenants behind their pace
        self._live = False  # whether a live request runs or waits

    def budget(self, view: View) -> Budget:
        """Counters and outlooks are brought up to date first."""
        done: dict[str, float] = {}  # by tenant: of its rows that run
        batch = 0
        for seq in view.running:
            request = seq.request
            if request.promise is None:
                batch += 1
                done[request.group] = done.get(request.group, 0.0) + seq.computed
        waiting = {seq.request.group for seq in view.waiting if seq.request.promise is None}
        self._live = batch < len(view.running) or any(seq.request.promise is not None for seq in view.waiting)
        self._follow(done, done.keys() | waiting)
        for group, outlook in self._outlooks.items():
            so_far = done.get(group, 0.0) + self._ended.get(group, 0.0)
            said = outlook.look(view.now, so_far)
            if said is not None:
                self.announced.append(said)
            (self._urgent.add if outlook.behind(view.now, so_far) else self._urgent.discard)(group)
        return super().budget(view)

    def _follow(self, done: Mapping[str, float], present: set[str]) -> None:
        """A tenant that comes, or comes back, begins where the one that has had least is: idleness earns nothing."""
        ended, weights = self._ended, self.weights
        had = {group: (done.get(group, 0.0) + ended.get(group, 0.0)) / weights.get(group, 1.0) for group in present}
        floor = min((had[group] + self._ahead[group] for group in present if group in self._served), default=0.0)
        for group in present - self._served.keys():
            self._ahead[group] = max(0.0, floor - had[group])
        self._served = {group: had[group] + self._ahead[group] for group in present}
        if len(self._ahead) > self.most:
            self._forget(present)

    def _forget(self, present: set[str]) -> None:
        """Tenants that are not there, those first that came first, until half of them are left: whoever comes back
        begins as a new one does. What a job has had is the job's."""
        gone = [group for group in self._ahead if group not in present and group not in self._outlooks]
        for group in gone[: len(self._ahead) - self.most // 2]:
            del self._ahead[group]
            self._ended.pop(group, None)

    def tokens(self, view: View) -> int:
        """As long as promised, or as whoever may come just now can bear."""
        if self._live or math.isinf(self.promise.first) or self._budgets is None:
            return super().tokens(view)
        decodes = [len(s.tokens) for s in view.running if len(s.tokens) - s.computed <= 1]
        context = sum(decodes) // max(len(decodes), 1)
        return self._budgets.tokens(PATIENT * self.promise.first, len(decodes), context, self._depth(view, context))

    def steady(self, view: View) -> int:
        """Not where a job's pace may fall behind meanwhile."""
        return 0 if self._outlooks else super().steady(view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """Live requests by phase; batch rows by phase, then by what their tenant has had, then by their plan."""
        now = WAIT if seq.ticket < 0 else DECODE if len(seq.tokens) - seq.computed <= 1 else PREFILL
        request = seq.request
        if request.promise is not None:
            return now, 0.0, 0.0
        if now == DECODE and request.group in self._urgent:
            return DECODE, 1.0, float(request.index)
        return BATCH + now, self._served.get(request.group, 0.0), float(request.index)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """As memory allows; a live request also in the place of batch rows."""
        found = super().admit(seq, reach, view)
        if found > view.now and not is_batch(seq):
            place = (self.rank(seq, view),)
            after = [s for s in view.running if is_batch(s) and s.yields and (self.rank(s, view),) > place]
            return -math.inf if would_make_room(after, seq, reach, view) else found
        return found

    def victim(self, seq: Sequence, others: Seq[Sequence], view: View) -> Sequence | None:
        """Batch rows first, and for a live request that waits nobody else."""
        batch = [other for other in others if is_batch(other)]
        if batch and (seq.ticket >= 0 or not is_batch(seq)):
            return batch[-1]
        return others[-1] if others and seq.ticket >= 0 and not is_batch(seq) else None

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Its tokens stay its tenant's."""
        super().retire(seq, finish, view)
        if is_batch(seq):
            group = seq.request.group
            self._ended[group] = self._ended.get(group, 0.0) + len(seq.tokens)
