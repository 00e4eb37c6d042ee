"""The loop: plan, run, commit. The same loop serves customers and simulations.

It knows the scheduler, an executor and a clock; it must not know tensors, files or what a policy prefers.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from shoal.core.clock import Clock
from shoal.core.types import Output, Request, Step, StepResult, Wait
from shoal.sched.scheduler import Scheduler


class Pending(Protocol):
    """A step that has been handed in."""

    def wait(self) -> StepResult:
        """Block until the step is done. Errors of the executor surface here."""
        ...


class Executor(Protocol):
    """Whatever can run a Step: a model on a device, or a pretence of one."""

    def submit(self, step: Step) -> Pending:
        """Start the step. Steps run in the order of their submission."""
        ...


class Engine:
    """`ahead` steps may be in flight while the next is planned: 0 or 1."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock, ahead: int = 0) -> None:
        self.scheduler, self.executor, self.clock, self.ahead = scheduler, executor, clock, ahead
        self.last: Step | None = None  # the step submitted last
        self.wait_until: float | None = None  # set when the last plan said that nothing can start before
        self.seconds_planning = 0.0
        self._flying: deque[tuple[Step, Pending]] = deque()

    def add(self, request: Request) -> Output | None:
        """Queue a request. An Output means it was refused, and says why."""
        return self.scheduler.add(request, self.clock.now())

    def cancel(self, id: str) -> Output | None:
        """End a request; None if there is none of that id."""
        return self.scheduler.cancel(id, self.clock.now())

    def tell(self, program: str, tool: str) -> None:
        """Say what a program does between its turns: the tool it calls, or "" when it has ended."""
        self.scheduler.policy.hear(program, tool, self.clock.now())

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        return bool(self._flying or self.scheduler.running or self.scheduler.waiting)

    def start(self) -> Pending | None:
        """Plan at the clock's time and submit; None if there is nothing to submit now."""
        began = self.clock.now()
        step = self.scheduler.plan(began)
        self.wait_until = step.until if isinstance(step, Wait) else None
        if step is None or isinstance(step, Wait):
            return None
        self.seconds_planning += self.clock.now() - began
        self.last = step
        pending = self.executor.submit(step)
        self._flying.append((step, pending))
        return pending

    def skip(self, step: Step, pending: Pending) -> None:
        """Put a later step in the place of the only one in flight: a simulation runs the last of many alike."""
        assert len(self._flying) == 1, "there is one step in flight, or nothing can be skipped"
        self._flying[0], self.last = (step, pending), step

    def finish(self) -> list[Output]:
        """Wait for the oldest step in flight and commit it."""
        step, pending = self._flying[0]
        result = pending.wait()  # interrupted or failed, the step stays in flight, and may be waited for again
        self._flying.popleft()
        return self.scheduler.commit(step, result, self.clock.now())

    def step(self) -> list[Output]:
        """Start a step, then finish whatever is more than `ahead` steps in flight. Returns the news."""
        started = self.start()
        outputs = self.scheduler.take_ended()
        if self._flying and (started is None or len(self._flying) > self.ahead):
            outputs += self.finish()
        return outputs
