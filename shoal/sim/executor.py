"""An executor that takes as long as a cost model says, and alone knows when each text ends.

It must not compute anything, and nothing it knows about lengths may reach the scheduler but as tokens.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from shoal.core.clock import SimClock
from shoal.core.types import Step, StepResult
from shoal.sched.cost import Cost

END, OTHER = 1, 2  # the two tokens of a pretend text


@dataclass(slots=True)
class SimPending:
    """A step that will have ended at `ends` [s]; waiting for it moves the clock."""

    clock: SimClock
    ends: float
    result: StepResult

    def wait(self) -> StepResult:
        if self.clock.now() < self.ends:
            self.clock.advance_to(self.ends)
        return self.result


class SimExecutor:
    """Runs one step after the other in pretend time. `lengths`: true output length by request id; those not in it
    run to their limit. `accept`: chance that a drafted token is right."""

    def __init__(
        self,
        clock: SimClock,
        cost: Cost,
        lengths: dict[str, int] | None = None,
        accept: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.clock, self.cost, self.accept = clock, cost, accept
        self.lengths: dict[str, int] = {} if lengths is None else lengths  # true ones, by request
        self._texts: dict[int, tuple[float, int, int]] = {}  # ticket -> positions of its first, END and last token
        self._free_at, self._luck = 0.0, random.Random(seed)
        self.busy = 0.0  # seconds of all steps

    def submit(self, step: Step) -> SimPending:
        """Price the step and sample its pretend tokens."""
        seconds = self._run(step)
        for ticket in step.drops:
            self._texts.pop(ticket, None)
        for start in step.starts:
            length, prompt = self.lengths.get(start.request.id), len(start.request.prompt)
            ends = -1 if length is None else prompt + length - 1
            limit = prompt + start.request.sampling.max_tokens - 1
            self._texts[start.ticket] = (prompt if start.request.samples else math.inf, ends, limit)
        return SimPending(self.clock, self._free_at, StepResult(self._sample(step), seconds=seconds))

    @property
    def ends(self) -> float:
        """When all that was handed in has ended [s]."""
        return self._free_at

    def _run(self, step: Step) -> float:
        """How long the step takes, which then ends when `_free_at` says."""
        seconds = self.cost.seconds(step)
        self._free_at = max(self._free_at, self.clock.now()) + seconds
        self.busy += seconds
        return seconds

    def _sample(self, step: Step) -> dict[int, list[int]]:
        tokens = {}
        for part in step.slices:
            at, (first, ends, _) = part.start + len(part.tokens), self._texts[part.ticket]
            if part.want and at >= first:  # hidden states may also be wanted to score a prompt, or as a vector
                count = 1
                while count <= part.draft and self._luck.random() < self.accept:
                    count += 1
                tokens[part.ticket] = [END if at + i == ends else OTHER for i in range(count)]
        return tokens

    # -- many steps alike: see sched/repeat ----------------------------------------------------------

    def until_end(self, step: Step) -> int:
        """How many steps like this one, itself among them, until one of its texts ends."""
        left = []
        for part in step.slices:
            at, (_, ends, limit) = part.start + len(part.tokens), self._texts[part.ticket]
            left.append((min(ends, limit) if ends >= at else limit) - at + 1)
        return min(left)

    def skip(self, step: Step, ends: float, seconds: float) -> SimPending:
        """As if the steps before this one had been run, and it were to end at `ends` [s], after so many seconds more
        than what was in flight."""
        self._free_at = ends
        self.busy += seconds
        return SimPending(self.clock, ends, StepResult(self._sample(step), seconds=seconds))
