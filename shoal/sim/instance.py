"""One engine in a simulated cluster: when it plans, when its steps end, and many of its steps at once.

It knows its engine and its executor; it must not know the other instances, nor who asked for what.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Protocol, runtime_checkable

from shoal.core.clock import SimClock
from shoal.core.types import Output, Request, Step
from shoal.engine import Engine
from shoal.sched.policy import Policy, View
from shoal.sched.repeat import alike, repeat, room
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import OTHER, SimExecutor
from shoal.sim.stages import Staged, StagedExecutor

ENDS, WAKES = 0, 2  # see cluster
BETWEEN = {"accept", "retire", "hear", "skipped"}  # told or asked when somebody comes or ends: no leap goes over that
LEAP = 256  # steps at most that are taken at once: they are priced when the first begins, and cut when somebody comes

At = Callable[[float, int, Callable[[], "Instance | None"]], None]


@runtime_checkable
class Repeats(Protocol):
    """A cost that can price many steps alike at once, to the last bit as one by one."""

    def repeated(self, step: Step, count: int) -> list[float]:
        """Durations of the decode-only step and of those after it, each with every sequence a token further on."""
        ...


@runtime_checkable
class Steady(Protocol):
    """A policy that can say that its answers stay."""

    def steady(self, view: View) -> int:
        """For how many plans its answers lead to the same while all that runs decodes, and nothing comes or ends."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A policy that counts plans."""

    def skipped(self, plans: int) -> None:
        """So many were made without it."""
        ...


def stays(policy: Policy, view: View) -> int:
    """For how many plans a policy's answers lead to the same while all that runs decodes, and nothing comes or ends."""
    kind = type(policy)
    if isinstance(policy, Steady):
        return policy.steady(view) if vouches(kind) else 0
    plain = kind.budget is Policy.budget and kind.chunk is Policy.chunk and kind.draft is Policy.draft
    return LEAP if plain and not view.waiting else 0


def vouches(kind: type) -> bool:
    """Whether `steady` was said of this class: it was not if a class below the one that says it answers otherwise."""
    line = kind.__mro__
    at = next((i for i, cls in enumerate(line) if "steady" in vars(cls)), 0)
    changed = {name for cls in line[:at] for name in vars(cls) if not name.startswith("__") and hasattr(line[at], name)}
    return changed <= BETWEEN


class Instance:
    """An engine whose steps end when its executor says. `leaps` is False only to compare."""

    def __init__(
        self, clock: SimClock, scheduler: Scheduler, executor: SimExecutor, ahead: int = 0, leaps: bool = True
    ) -> None:
        self.clock, self.executor = clock, executor
        self.engine = Engine(scheduler, executor, clock, ahead)
        self.number = 0
        self._stages = executor if isinstance(executor, StagedExecutor) else None
        self._staged = scheduler.policy if isinstance(scheduler.policy, Staged) else None
        self._under_way: deque[Step] = deque()  # in stages
        self._blocked = False  # all there is awaits a step in flight: whoever runs a model waits for that too
        self._leaps = leaps and ahead == 0 and isinstance(executor.cost, Repeats)
        self._ends: list[float] = []  # of the steps of a leap, the one in flight first; empty without one
        self._version = 0  # of the event that ends what is in flight
        self.held = self.looked = 0.0  # blocks in use, summed over steps, and how many steps
        self.leapt = 0  # steps that were not taken one by one

    def join(
        self, number: int, at: At, hear: Callable[[Output], None], tokens: Callable[[str, Seq[float]], None]
    ) -> None:
        """Become an instance of a cluster: `at` is how it expects something, the others are told the news."""
        self.number, self._at, self._hear, self._tokens = number, at, hear, tokens

    def add(self, request: Request, length: int, now: float) -> Output | None:
        """A request whose answer will have `length` tokens. An Output means it was refused, and says why."""
        if self._ends:
            self._cut(now)
        self.executor.lengths[request.id] = length
        refused = self.engine.add(request)
        if refused is not None:
            del self.executor.lengths[request.id]
        return refused

    @property
    def staged(self) -> bool:
        """Whether its model is in several stages."""
        return self._stages is not None

    @property
    def idle(self) -> float:
        """Seconds that stages have waited though steps were under way."""
        return self._stages.idle if self._stages is not None else 0.0

    # -- steps -------------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Plan and submit what can be planned now."""
        engine = self.engine
        while engine.scheduler.in_flight <= engine.ahead and not self._blocked:
            if self._stages is not None and self._stages.takes_from > now:
                self._at(self._stages.takes_from, WAKES, lambda: self)
                return
            before = engine.scheduler.counters.preemptions
            pending = engine.start()
            ended = engine.scheduler.take_ended()
            self._tell(ended)
            if pending is None and engine.busy and not engine.scheduler.in_flight and engine.wait_until is None:
                assert ended or engine.scheduler.counters.preemptions > before, "a plan of nothing that changes nothing"
                continue  # who failed, or lost its memory to nobody, has made room for another plan
            if pending is None:
                if engine.wait_until is not None:
                    self._at(max(engine.wait_until, now), WAKES, lambda: self)
                self._blocked = self._stages is None and engine.scheduler.in_flight > 0
                return
            step = engine.last
            assert step is not None
            if self._staged is not None:
                self._staged.busy.update(part.ticket for part in step.slices)
                self._under_way.append(step)
            if not (self._leaps and self._leap(step, now)):
                self._expect(self.executor.ends)

    def _expect(self, when: float) -> None:
        """The oldest step in flight ends then."""
        version = self._version

        def ends() -> Instance | None:
            if version != self._version:
                return None  # a leap was cut: its end comes sooner
            return self._finish()

        self._at(when, ENDS, ends)

    def _finish(self) -> Instance:
        """The oldest step in flight has ended, and with it a leap."""
        if len(self._ends) > 1:
            self._pass(len(self._ends) - 1)
        self._ends.clear()
        self._blocked = False
        self.held += self.engine.scheduler.kv.in_use
        self.looked += 1
        self._tell(self.engine.finish())
        if self._staged is not None:
            self._staged.busy.difference_update(part.ticket for part in self._under_way.popleft().slices)
        return self

    def _tell(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if output.finish is not None:
                self.executor.lengths.pop(output.id, None)
            self._hear(output)

    # -- leaps -------------------------------------------------------------------------------------

    def _leap(self, step: Step, now: float) -> bool:
        """Take as many steps at once as will be alike, if more than one will."""
        scheduler = self.engine.scheduler
        if not alike(scheduler, step):
            return False
        count = min(self.executor.until_end(step), LEAP) - 1
        if count > 0:
            count = min(count, stays(scheduler.policy, scheduler.view(now)))
        if count > 0:
            count = room(scheduler.kv, step, count)
        if count <= 0:
            return False
        assert isinstance(self.executor.cost, Repeats)
        seconds = self.executor.cost.repeated(step, count + 1)
        self._ends = list(accumulate(seconds[1:], initial=self.executor.ends))
        self._expect(self._ends[-1])
        return True

    def _pass(self, count: int) -> None:
        """The first steps of the leap have ended; the one after them is in flight."""
        scheduler, executor, kv = self.engine.scheduler, self.executor, self.engine.scheduler.kv
        step, times = self.engine.last, self._ends[:count]
        assert step is not None
        names = [scheduler.running[part.ticket].request.id for part in step.slices]
        before = kv.in_use
        step = repeat(scheduler, step, OTHER, count)
        self.held += (before + kv.in_use) / 2 * count  # as if blocks were taken evenly
        self.looked += count
        self.leapt += count
        if isinstance(scheduler.policy, Counting):
            scheduler.policy.skipped(count)
        ends = self._ends[count]
        self.engine.skip(step, executor.skip(step, ends, ends - self._ends[0]))
        for name in names:
            self._tokens(name, times)
        del self._ends[:count]

    def _cut(self, now: float) -> None:
        """Something comes that the next plan will see: only the step that is in flight now remains of the leap."""
        passed = bisect_left(self._ends, now)
        if passed:
            self._pass(passed)
        self._version += 1
        ends = self._ends[0]
        self._ends.clear()
        if ends == now:
            self._finish()
        else:
            self._expect(ends)
