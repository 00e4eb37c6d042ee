"""A model in stages, one after the other, with steps that follow each other through them.

It knows what a step takes in each stage; it must not know why a step holds what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from shoal.core.clock import SimClock
from shoal.core.sequence import Sequence
from shoal.core.types import Finish, Request, Step
from shoal.kv.tree import Node
from shoal.sched.cost import Cost
from shoal.sched.policies.decode_maximal import DecodeMaximal
from shoal.sched.policy import Budget, Key, Policy, Reach, View
from shoal.sim.executor import SimExecutor

PerStage = Callable[[Step], Seq[float]]  # seconds in each stage


class StagedExecutor(SimExecutor):
    """Each stage takes steps in order, one at a time. `bubbles` counts the seconds in which a stage has nothing to do
    though steps are under way: from the end of one step there to the coming of the next (SARATHI, arXiv 2308.16369)."""

    def __init__(
        self, clock: SimClock, cost: Cost, per_stage: PerStage, stages: int, lengths: dict[str, int] | None = None
    ) -> None:
        super().__init__(clock, cost, lengths)
        self._per_stage = per_stage
        self.free = [0.0] * stages  # when each stage has done all that was handed in
        self.bubbles: dict[str, float] = {}  # by request: of the steps it had a part in
        self.idle = 0.0  # of all steps, each counted once
        self._ids: dict[int, str] = {}  # by ticket

    @property
    def takes_from(self) -> float:
        """When the first stage is free [s]."""
        return self.free[0]

    def _run(self, step: Step) -> float:
        for start in step.starts:
            self._ids[start.ticket] = start.request.id
        seconds = list(self._per_stage(step))
        assert len(seconds) == len(self.free), (len(seconds), len(self.free))
        at, lost = self.clock.now(), 0.0
        under_way = at <= self.free[-1]  # else nothing was when it came: what the stages have waited is no bubble
        for stage, taken in enumerate(seconds):
            if under_way:
                lost += max(at - self.free[stage], 0.0)
            at = max(at, self.free[stage]) + taken
            self.free[stage] = at
        self._free_at = at
        self.busy += sum(seconds)
        self.idle += lost
        for part in step.slices:
            name = self._ids[part.ticket]
            self.bubbles[name] = self.bubbles.get(name, 0.0) + lost
        for ticket in step.drops:
            self._ids.pop(ticket, None)
        return sum(seconds)


class Staged(Policy):
    """Another policy, for a model in stages: a sequence is in at most one step in flight, and each step takes its share
    of those that decode, so that there is something for every stage."""

    def __init__(self, policy: Policy, stages: int) -> None:
        super().__init__(policy.limit)
        self.policy, self.stages = policy, stages
        if isinstance(policy, DecodeMaximal):
            policy.stages = stages  # its chunk is for as many riders as a step has
        self.busy: set[int] = set()  # tickets of the steps in flight; kept by who starts and finishes them
        self._decodes = math.inf  # that this plan may still take

    def accept(self, request: Request, view: View) -> str:
        """As the policy says."""
        return self.policy.accept(request, view)

    def budget(self, view: View) -> Budget:
        """As the policy says."""
        decoding = sum(seq.produced > 0 for seq in view.running)
        self._decodes = -(-decoding // self.stages)
        return self.policy.budget(view)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """As the policy says."""
        return self.policy.admit(seq, reach, view)

    def rank(self, seq: Sequence, view: View) -> Key:
        """As the policy says."""
        return self.policy.rank(seq, view)

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """Nothing of what is in flight; else as the policy says, while the share lasts."""
        if seq.ticket in self.busy:
            return 0
        if seq.running and seq.produced > 0:
            if self._decodes <= 0:
                return 0
            self._decodes -= 1
        return self.policy.chunk(seq, room, view)

    def draft(self, seq: Sequence, view: View) -> int:
        """As the policy says."""
        return self.policy.draft(seq, view)

    def victim(self, seq: Sequence, others: Seq[Sequence], view: View) -> Sequence | None:
        """As the policy says."""
        return self.policy.victim(seq, others, view)

    def worth(self, node: Node) -> float:
        """As the policy says."""
        return self.policy.worth(node)

    def revalued(self, view: View) -> Iterable[Node]:
        """As the policy says."""
        return self.policy.revalued(view)

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """As the policy says."""
        self.policy.retire(seq, finish, view)

    def hear(self, program: str, tool: str, now: float) -> None:
        """As the policy says."""
        self.policy.hear(program, tool, now)
