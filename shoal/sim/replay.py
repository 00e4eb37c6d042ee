"""Requests that arrive when they will, and a run written down as it happens, to be run again from that.

It knows the engine's doors; it must not know what is behind them: a model, a pretence, or a record of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal.core.clock import Clock
from shoal.core.types import Output, Request, Step, StepResult
from shoal.engine import Engine, Executor, Pending
from shoal.sim.fit import Timed, timed


def open_loop(
    engine: Engine, requests: Sequence[Request], idle: Callable[[float], None]
) -> list[tuple[float, Output]]:  # fmt: skip
    """Add each request at its arrival, run until all have ended, and say when there was news of what. `requests` come
    in order of arrival; `idle` lets the clock get on to a moment at which there is something to do."""
    news: list[tuple[float, Output]] = []
    place = 0
    while place < len(requests) or engine.busy:
        now = engine.clock.now()
        while place < len(requests) and requests[place].arrival <= now:
            refused = engine.add(requests[place])
            news += [(now, refused)] if refused else []
            place += 1
        ahead = [request.arrival for request in requests[place : place + 1]]
        if engine.busy:
            found = engine.step()
            when = engine.clock.now() if found else now
            news += [(when, output) for output in found]
            if engine.wait_until is not None:  # then nothing ran, and it is still as late as it was
                idle(min([engine.wait_until, *ahead]))
        elif ahead:
            idle(ahead[0])
    return news


@dataclass(slots=True)
class Record:
    """What an engine was told, and what it planned."""

    times: list[float] = field(default_factory=list)  # all that its clock said, in order
    results: list[StepResult] = field(default_factory=list)  # in the order of the steps
    plans: list[Step] = field(default_factory=list)
    steps: list[Timed] = field(default_factory=list)


class Recorder:
    """Stands before an engine's clock and executor, as both, and writes down what they say."""

    def __init__(self, clock: Clock, executor: Executor) -> None:
        self.record = Record()
        self._clock, self._executor = clock, executor
        self._free = -float("inf")  # when the last step was seen to have ended

    def now(self) -> float:
        """The clock's time."""
        self.record.times.append(self._clock.now())
        return self.record.times[-1]

    def submit(self, step: Step) -> Pending:
        """Hand the step on."""
        self.record.plans.append(step)  # written out only afterwards: that takes as long as planning
        began = self.record.times[-2]  # the engine looks when it begins to plan, and when it has planned
        return _Seen(self, step, self._executor.submit(step), began)

    def ended(self, step: Step, began: float, result: StepResult) -> None:
        """A step has ended: it took the time since its planning began, or since the one before ended."""
        end = self._clock.now()
        self.record.steps.append(timed(step, end - max(began, self._free)))
        self.record.results.append(result)
        self._free = end


@dataclass(slots=True)
class _Seen:
    recorder: Recorder
    step: Step
    pending: Pending
    began: float

    def wait(self) -> StepResult:
        result = self.pending.wait()
        self.recorder.ended(self.step, self.began, result)
        return result


def written(plans: Sequence[Step]) -> list[bytes]:
    """Every field of each step, as bytes; equal steps have equal ones, and no others."""
    return [repr(step).encode() for step in plans]


class Replay:
    """A clock and an executor that say again what was recorded, in order, and note what they are asked to run."""

    def __init__(self, record: Record) -> None:
        self.plans: list[Step] = []
        self._times, self._results = iter(record.times), iter(record.results)

    def now(self) -> float:
        """The next recorded time; ValueError where the record has ended, for this run is then another one."""
        for when in self._times:
            return when
        raise ValueError("the run that is repeated looks at its clock more often than the recorded one")

    def submit(self, step: Step) -> Pending:
        """Note the step; its result is the next recorded one."""
        self.plans.append(step)
        return _Again(self._results)


@dataclass(slots=True)
class _Again:
    results: Iterator[StepResult]

    def wait(self) -> StepResult:
        for result in self.results:
            return result
        raise ValueError("the run that is repeated has more steps than the recorded one")
