"""Several instances of the engine in one pretended time: arrivals, steps and their ends in one heap of events.

It knows engines, clocks and who asks for what; it must not decide anything that a scheduler decides. An instance is
the product's own Engine with the product's own scheduler: a step is planned, run and committed as for customers.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush

from shoal.core.clock import SimClock
from shoal.core.types import TOKEN, Output, Request, Sampling, Tokens
from shoal.sched.place import Load, Placement, RoundRobin
from shoal.sim.executor import END, OTHER
from shoal.sim.instance import Instance
from shoal.sim.program import Given, Program, Turn, spell
from shoal.sim.record import Record

ENDS, COMES, WAKES = 0, 1, 2  # what happens at one moment happens in this order; then instances plan

Event = tuple[float, int, int, Callable[[], Instance | None]]


@dataclass(slots=True)
class Talk:
    """A program that is under way."""

    program: Program
    turns: Iterator[Turn]
    several: int  # turns; 0 for a request alone, and 1 for requests of which each waits for the one before
    number: int = 0  # turns begun
    said: Tokens = field(default_factory=lambda: array(TOKEN))  # all of it, where the program keeps that
    turn: Turn | None = None
    record: Record | None = None


class Cluster:
    """Used for one run. Its instances share its clock and nothing else."""

    def __init__(self, clock: SimClock, instances: Seq[Instance], placement: Placement | None = None) -> None:
        self.clock, self.instances = clock, instances
        self.placement = placement or RoundRobin()
        self.records: list[Record] = []  # in order of arrival
        self._loads = [Load() for _ in instances]
        self._talks: dict[str, Talk] = {}  # by request
        self._events: list[Event] = []
        self._pushed = 0
        self._touched: dict[int, Instance] = {}  # instances that may plan when all that happens now has happened
        for number, instance in enumerate(instances):
            instance.join(number, self._at, self._hear, self._tokens)

    def run(self, programs: Iterable[Program], until: float = math.inf) -> list[Record]:
        """Let programs, in order of their beginnings, be answered; the records of all requests that came before
        `until` [s], when everything stops."""
        waiting = iter(programs)
        self._next(waiting)
        while self._events and self._events[0][0] <= until:
            now = self._events[0][0]
            self.clock.advance_to(now)
            while self._events and self._events[0][0] == now:
                touched = heappop(self._events)[3]()
                if touched is not None:
                    self._touched[touched.number] = touched
            while self._touched:
                self._touched.pop(next(iter(self._touched))).pump(now)
        stuck = [instance.number for instance in self.instances if instance.engine.busy]
        assert not stuck or self._events, f"instances {stuck} have work and nothing will happen"
        return self.records

    # -- programs ----------------------------------------------------------------------------------

    def _at(self, when: float, order: int, act: Callable[[], Instance | None]) -> None:
        self._pushed += 1
        heappush(self._events, (when, order, self._pushed, act))

    def _next(self, waiting: Iterator[Program]) -> None:
        """Expect the next program."""
        program = next(waiting, None)
        if program is None:
            return

        def comes() -> Instance | None:
            self._next(waiting)
            turns = program.turns
            several = 1 if not isinstance(turns, tuple) else len(turns) if len(turns) > 1 else 0
            self._go_on(Talk(program, iter(turns), several))
            return None

        self._at(max(program.at, self.clock.now()), COMES, comes)

    def _go_on(self, talk: Talk) -> None:
        """Expect the program's next turn."""
        turn = next(talk.turns, None)
        if turn is not None:
            self._at(self.clock.now() + turn.pause, COMES, lambda: self._ask(talk, turn))

    def _ask(self, talk: Talk, turn: Turn) -> Instance | None:
        """A turn arrives at an instance."""
        request = self._request(talk, turn)
        record = Record(
            request.id, request.arrival, len(request.prompt), turn.limit, request.group, request.program,
            request.promise, request.deadline,
        )  # fmt: skip
        talk.turn, talk.record = turn, record
        self.records.append(record)
        record.instance = self.placement.choose(request, self._loads)
        instance, load = self.instances[record.instance], self._loads[record.instance]
        load.requests += 1
        load.prompt += record.prompt
        self._talks[request.id] = talk
        refused = instance.add(request, turn.length, request.arrival)
        if refused is not None:
            self._ended(talk, refused)
        return instance

    def _request(self, talk: Talk, turn: Turn) -> Request:
        program, now, given = talk.program, self.clock.now(), turn.given or Given(spell(turn.pieces))
        prompt = given.tokens
        talk.number += 1
        if talk.several and program.keeps:
            talk.said += prompt
            prompt = talk.said[:]
        begun = program.at if program.keeps else now
        return Request(
            id=f"{program.id}.{talk.number}" if talk.several else program.id, prompt=prompt,
            sampling=Sampling(max_tokens=turn.limit, stop=frozenset({END})), arrival=now,
            deadline=begun + program.deadline, promise=program.promise, group=program.group,
            program=program.id if talk.several and program.keeps else "", salt=given.salt, index=given.index,
            future=given.future,
        )  # fmt: skip

    # -- news --------------------------------------------------------------------------------------

    def _tokens(self, id: str, times: Seq[float]) -> None:
        """Tokens of a request have come."""
        record = self._talks[id].record
        assert record is not None
        if not record.times:
            self._loads[record.instance].prompt -= record.prompt
        record.times.extend(times)

    def _hear(self, output: Output) -> None:
        """News of a request."""
        if output.tokens:
            self._tokens(output.id, [self.clock.now()] * len(output.tokens))
        if output.finish is not None:
            self._ended(self._talks[output.id], output)

    def _ended(self, talk: Talk, output: Output) -> None:
        record, turn = talk.record, talk.turn
        assert record is not None and turn is not None
        load = self._loads[record.instance]
        load.requests -= 1
        if not record.times:
            load.prompt -= record.prompt
        del self._talks[record.id]
        timing = output.timing or {}
        record.end, record.finish, record.error = self.clock.now(), output.finish, output.error
        record.start = timing.get("start", math.nan)
        record.cached, record.preemptions = int(timing.get("cached", 0)), int(timing.get("preemptions", 0))
        goes_on = record.answered or not talk.program.keeps  # nobody goes on with what was not answered
        if record.program and goes_on:
            talk.said.extend([OTHER] * (len(record.times) - 1))
            talk.said.append(output.tokens[-1])
        tool = turn.tool if goes_on and talk.number < talk.several else ""
        if record.program and (tool or not goes_on or talk.number == talk.several):
            self.instances[record.instance].engine.tell(record.program, tool)
        if goes_on:
            self._go_on(talk)
