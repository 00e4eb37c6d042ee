"""Engines that die are followed by others, after pauses that grow; nothing else is tried again by itself."""

from __future__ import annotations

import io
import time

import pytest
from echo_job import Mortal, chat
from rich.console import Console

from shoal.core.errors import ShoalError
from shoal.jobs.display import Display
from shoal.jobs.engines import DEATHS, LONGEST, Engines, pause_after
from shoal.jobs.meter import Meter
from shoal.jobs.patience import Patience
from shoal.jobs.stop import Stop, WallClock


def test_pauses_grow_up_to_a_limit_and_the_first_is_none() -> None:
    pauses = [pause_after(deaths) for deaths in range(20)]
    assert pauses[:5] == [0, 0, 1, 2, 4] and pauses == sorted(pauses) and pauses[-1] == LONGEST


class Once(Mortal):
    """The first engine dies in its second round, all others live."""

    made = 0

    def dies(self, running: set[int]) -> bool:
        return self.number == 1 and self.rounds == 2


class Never(Mortal):
    """No engine completes a row."""

    made = 0

    def dies(self, running: set[int]) -> bool:
        return True


def test_a_single_death_costs_no_pause(job) -> None:
    Once.made = 0
    one = job([chat(i) for i in range(30)])
    assert one.run_mortal(Once) == 0
    assert Once.made == 2 and sum(one.paused) == 0


def test_deaths_without_a_row_between_them_are_further_and_further_apart(job) -> None:
    Never.made = 0
    one = job([chat(i) for i in range(200)])
    with pytest.raises(ShoalError, match="times without completing a row"):
        one.run_mortal(Never)
    assert one.paused == [pause_after(deaths) for deaths in range(1, DEATHS)] and sum(one.paused) > 30


def test_waiting_goes_on_with_other_work_and_ends_when_asked_to_stop() -> None:
    stop, calls = Stop(), 0
    display = Display(Console(file=io.StringIO()), WallClock(), quiet=True)
    meter = Meter(time.monotonic())
    engines = Engines(None, None, lambda: pytest.fail("no engine yet"), meter, Patience(lambda: 0.0), display, stop)

    def meanwhile() -> None:
        nonlocal calls
        calls += 1
        stop.asked = calls == 3

    began = time.monotonic()
    engines.wait(600.0, meanwhile)
    assert calls == 3 and time.monotonic() - began < 60
