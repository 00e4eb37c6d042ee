"""Which unit an engine gets next, where there is one engine and where a plan is dealt to several.

It knows the plan, what each unit will roughly cost, and how many requests each engine has; it must not know engines,
rows or answers. Several engines get one run of the plan each, of equal predicted cost, cut where neighbours share
least. Who has handed out all of its run takes over the end of the run that has most left, if that pays for the prefix
that is then computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shoal.jobs.plan import Plan, Staircase, Unit

WINDOW = 1024  # requests that wait in an engine: enough to choose from, few enough to look at in every step
LEAST = 128  # of several engines, near their ends: what an engine has waiting nobody takes over
RUN = 32  # units that an engine gets in one piece of what has no plan
ANSWER = 2.0  # what a token of an answer costs, in prompt tokens: a step of answers alone computes fewer of them
READ = 1 / 400  # what each position costs that a token of an answer looks at
UNKNOWN = 128.0  # tokens of an answer that may end anywhere, as far as nothing better is known

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Supply(Protocol):
    """Where units come from."""

    apart: int  # prompt tokens that are computed once more because an engine has not what another has

    @property
    def over(self) -> bool:
        """Whether there will be no more."""
        ...

    def room(self, engine: int, waiting: int) -> int:
        """How many requests an engine may be given now, of which so many wait there already."""
        ...

    def next(self, engine: int, busy: list[int]) -> Unit | None:
        """The next unit for an engine; `busy` has the requests in each. None when it gets none for now."""
        ...

    def taken(self, position: int) -> bool:
        """Whether the unit at this position of the plan has been handed out."""
        ...


class InTurn:
    """Units one after the other, to whoever asks."""

    def __init__(self, units: Iterator[Unit], engines: int = 1) -> None:
        self.over, self.apart = False, 0
        self._units, self._engines = units, engines
        self._position = -1  # of the unit taken last

    def room(self, engine: int, waiting: int) -> int:
        """With several, a piece at a time, so that each gets some."""
        room = WINDOW - waiting if waiting <= WINDOW // 2 else 0
        return room if self._engines == 1 else min(room, RUN)

    def next(self, engine: int, busy: list[int]) -> Unit | None:
        """The next unit. Of several engines the idler one gets it."""
        if self._engines > 1 and busy[engine] > min(busy) + RUN:
            return None
        unit = next(self._units, None)
        if unit is None:
            self.over = True
            return None
        self._position = unit.position
        return unit

    def taken(self, position: int) -> bool:
        """By its place before the last one."""
        return position <= self._position


@dataclass(slots=True)
class _Run:
    """What an engine has of the plan: places low … high - 1 are still to be handed out."""

    low: int = 0
    high: int = 0
    units: Iterator[Unit] | None = None
    shift: int = 0  # from the plan's indexes to those of the engine's own sequence, which only grow
    end: int = 0  # the plan's index of the first request behind the run
    top: int = -1  # highest index the engine has been given


class Dealt:
    """A plan dealt to several engines. Places are among its wanted units, in serving order."""

    def __init__(self, plan: Plan, wanted: Callable[[int], bool], engines: int, least: int | None = None) -> None:
        self.apart = 0
        self.moved = 0  # times that an engine has taken over a part of another's run
        self._plan, self._wanted = plan, wanted
        self._least = LEAST if least is None else least
        self._runs = [_Run() for _ in range(engines)]
        self._dealt = False  # not before somebody asks: the plan may be another by then

    @property
    def over(self) -> bool:
        """Whether all is handed out."""
        self._deal()
        return all(run.low >= run.high for run in self._runs)

    def room(self, engine: int, waiting: int) -> int:
        """At most a quarter of what is left, so that the rest can still be taken over."""
        self._deal()
        run = self._runs[engine]
        most = min(WINDOW, max(self._least, (run.high - run.low) // 4))
        return most - waiting if waiting <= most // 2 else 0

    def next(self, engine: int, busy: list[int]) -> Unit | None:
        """The next of its own run, or of what it takes over."""
        self._deal()
        run = self._runs[engine]
        while run.low < run.high or self._take_over(engine, busy):
            unit = next(run.units or iter(()), None)
            place = len(self._places) if unit is None else int(np.searchsorted(self._places, unit.position))
            if unit is None or place >= run.high:
                run.low = run.high
                continue
            run.low = place + 1
            return self._own(run, unit)
        return None

    def taken(self, position: int) -> bool:
        """Whether no run has it any more."""
        self._deal()
        place = int(np.searchsorted(self._places, position))
        return not any(run.low <= place < run.high for run in self._runs)

    # -- dealing -----------------------------------------------------------------------------------

    def _deal(self) -> None:
        if self._dealt:
            return
        self._dealt = True
        plan = self._plan
        if not plan.num_units:
            self._places = np.zeros(0, dtype=np.int64)
            return
        units = plan.units[plan.served]
        known = {row: self._wanted(row) for row in np.unique(units["row"]).tolist()}
        self._places = np.flatnonzero([known[row] for row in units["row"].tolist()])
        units = units[self._places]
        self._shares = plan.shares(self._places)
        self._costs = np.append(0.0, np.cumsum(cost_of(units, self._shares)))  # of all units before a place
        self._mean = float(self._costs[-1]) / max(int(units["samples"].sum()), 1)
        bounds = cut(self._costs, self._shares, len(self._runs))
        for run, low, high in zip(self._runs, bounds, bounds[1:], strict=False):
            self._give(run, low, high)
        if plan.order == "input":  # a run begins with one prefix, and comes back to many that others have too
            parts = sum(plan.bound_of(self._places[low:high]) for low, high in zip(bounds, bounds[1:], strict=False))
            self.apart = parts - plan.bound_of(self._places)

    def _give(self, run: _Run, low: int, high: int) -> None:
        """The units at places low … high - 1 are an engine's from now on."""
        run.low = low
        self._end(run, high)
        if low == high:
            return
        position = int(self._places[low])
        self.apart += int(self._shares[low])
        run.units = self._plan.units_from(position, self._wanted)
        run.shift = run.top + 1 - self._plan.index(position)

    def _end(self, run: _Run, high: int) -> None:
        """A run goes up to here."""
        run.high = high
        run.end = self._plan.index(int(self._places[high - 1]) + 1) if high else 0

    def _own(self, run: _Run, unit: Unit) -> Unit:
        """A unit as the engine is to see it: with an index of its own sequence, and of the known future what concerns
        its own run. Another engine's rows will never ask for what this one keeps."""
        futures = unit.futures
        if futures is not None:
            futures = tuple(_seen(one, run.end, run.shift) for one in futures)
        own = replace(unit, index=unit.index + run.shift, futures=futures)
        run.top = own.index + unit.samples - 1
        return own

    def _take_over(self, engine: int, busy: list[int]) -> bool:
        """Take the end of the run that has most left. False where that would end the job no sooner, or by less than
        the shared prefix costs that is computed again."""
        left = [
            float(self._costs[run.high] - self._costs[run.low]) if run.high > run.low else 0.0 for run in self._runs
        ]
        giver = max(range(len(left)), key=left.__getitem__)
        run = self._runs[giver]
        if run.high - run.low < 1 or giver == engine:
            return False
        ours, theirs = (self._mean * busy[one] for one in (engine, giver))
        places = np.arange(run.low, run.high)
        behind = theirs + self._costs[places] - self._costs[run.low]
        taken = ours + self._shares[places] + self._costs[run.high] - self._costs[places]
        end = np.maximum(behind, taken)
        best = int(np.argmin(end))
        if theirs + left[giver] - end[best] <= self._shares[places[best]]:
            return False
        high = run.high
        self._end(run, int(places[best]))
        self._give(self._runs[engine], run.high, high)
        self.moved += 1
        return True


def cost_of(units: npt.NDArray[np.void], shares: Ints) -> Floats:
    """What units will roughly cost, in prompt tokens, each after the one before it."""
    limit, expect = units["limit"].astype(np.float64), units["expect"].astype(np.float64)
    answer = np.where(expect >= 0, expect, np.minimum(limit, UNKNOWN)) * units["samples"]
    found: Floats = units["goal"] - shares + answer * (ANSWER + READ * units["length"])
    return np.maximum(found, 1.0)


def cut(costs: Floats, shares: Ints, parts: int) -> list[int]:
    """The bounds of `parts` runs of equal cost, moved to where the prefix that is computed again costs less than runs
    that are not equal. `costs[i]` is what all units before place i cost."""
    bounds = [0]
    for part in range(1, parts):
        places = np.arange(bounds[-1], len(shares))
        if not len(places):
            bounds.append(len(shares))
            continue
        uneven = np.abs(costs[places] - costs[-1] * part / parts)
        bounds.append(int(places[np.argmin(uneven + shares[places])]))
    return [*bounds, len(shares)]


def _seen(future: Staircase, end: int, shift: int) -> Staircase:
    return tuple((depth, index + shift) for depth, index in future if index < end)
