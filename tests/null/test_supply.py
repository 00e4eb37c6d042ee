"""A plan dealt to several engines: everything once, cut where little is shared, taken over where that pays."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_jobs import Asked, Line, computed_in_order, future_of, plan_of, random_lines

from shoal.jobs.plan import Plan, Unit
from shoal.jobs.supply import WINDOW, Dealt, InTurn, cut

Choose = Callable[[list[list[Unit]]], int]


def everybody(row: int) -> bool:
    return True


def hand_out(supply: Dealt, engines: int, choose: Choose, busy: Callable[[int], int]) -> list[list[Unit]]:
    """All units by engine, each time to the engine that is chosen."""
    given: list[list[Unit]] = [[] for _ in range(engines)]
    while not supply.over:
        engine = choose(given)
        unit = supply.next(engine, [busy(one) for one in range(engines)])
        if unit is not None:
            given[engine].append(unit)
    return given


def asked_of(lines: list[Line], units: list[Unit]) -> list[Asked]:
    """The requests of some units, in their order."""
    found = []
    for unit in units:
        line = lines[unit.row]
        prompt = line.prompts[unit.prompt]
        for sample in range(unit.samples):
            limit = line.score_from - 1 if line.score_from >= 1 and sample == 0 else len(prompt)
            found.append(Asked(line.root, prompt if line.max_tokens else prompt[:-1], prompt, limit))
    return found


def computed(lines: list[Line], given: list[list[Unit]]) -> int:
    return sum(computed_in_order(asked_of(lines, units)) for units in given)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_everything_is_handed_out_once_and_the_excess_is_what_is_said(seed: int, engines: int, scored: bool) -> None:
    rng = random.Random(seed)
    lines = random_lines(rng, rng.randrange(1, 30), scored)
    done = {row for row in range(len(lines)) if rng.random() < 0.2}
    with TemporaryDirectory() as folder:
        plan = plan_of(lines, Path(folder))
        supply = Dealt(plan, lambda row: row not in done, engines)
        given = hand_out(supply, engines, lambda given: rng.randrange(engines), lambda engine: rng.randrange(40))
        wanted = [unit for unit in plan.units_from() if unit.row not in done]
        assert sorted((unit.row, unit.prompt) for units in given for unit in units) == sorted(
            (unit.row, unit.prompt) for unit in wanted
        )
        excess = computed(lines, given) - computed(lines, [wanted])
        assert excess <= supply.apart if supply.moved else excess == supply.apart
        assert supply.apart <= (engines - 1 + supply.moved) * max((len(p) for x in lines for p in x.prompts), default=0)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_known_future_of_an_engine_is_what_comes_to_it(tmp_path: Path, seed: int, scored: bool) -> None:
    rng = random.Random(seed)
    lines = random_lines(rng, 25, scored)
    plan = plan_of(lines, tmp_path)
    supply = Dealt(plan, everybody, 3)
    given: list[list[Unit]] = [[], [], []]
    for engine in range(3):  # who has much to do takes nothing over
        busy = [10**9 if one == engine else 0 for one in range(3)]
        while (unit := supply.next(engine, busy)) is not None:
            given[engine].append(unit)
    assert supply.over and not supply.moved
    for units in given:
        requests = asked_of(lines, units)
        assert [unit.index for unit in units] == np.cumsum([0, *(unit.samples for unit in units)])[:-1].tolist()
        assert [one for unit in units for one in unit.futures or ()] == [
            future_of(requests, i) for i in range(len(requests))
        ]


@pytest.mark.parametrize("seed", range(10))
def test_indexes_of_an_engine_only_grow_whatever_it_takes_over(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    plan = plan_of(random_lines(rng, 40), tmp_path)
    supply = Dealt(plan, everybody, 3)
    given = hand_out(supply, 3, lambda given: rng.choice([0, 0, 0, 1, 2]), lambda engine: 0)
    assert supply.moved > 0
    for units in given:
        ends = [unit.index + unit.samples for unit in units]
        assert all(unit.index >= end for unit, end in zip(units[1:], ends, strict=False))
        assert all(
            later > unit.index + sample
            for unit in units
            for sample, steps in enumerate(unit.futures or ())
            for _, later in steps
        )


def test_runs_are_equal_and_cut_where_nothing_is_shared(tmp_path: Path) -> None:
    lines = [Line(((group,) * 50 + (100 + i, i),)) for group in range(6) for i in range(10)]
    plan = plan_of(lines, tmp_path)
    supply = Dealt(plan, everybody, 3)
    given = hand_out(supply, 3, lambda given: min(range(3), key=lambda one: len(given[one])), lambda engine: 0)
    assert (supply.apart, supply.moved) == (0, 0)
    assert [{lines[unit.row].prompts[0][0] for unit in units} for units in given] == [{0, 1}, {2, 3}, {4, 5}]


def test_a_cut_moves_to_where_it_costs_less_than_unequal_runs() -> None:
    costs = np.arange(101, dtype=np.float64)
    shares = np.full(100, 30)
    assert cut(costs, shares, 2) == [0, 50, 100], "everywhere alike: in the middle"
    shares[60] = 5
    assert cut(costs, shares, 2) == [0, 60, 100], "ten units of cost for 25 tokens"
    shares[60], shares[90] = 30, 0
    assert cut(costs, shares, 2) == [0, 50, 100], "forty for thirty: no"
    assert cut(np.zeros(1), np.zeros(0, dtype=np.int64), 3) == [0, 0, 0, 0]


def test_who_is_done_takes_over_what_pays_and_leaves_what_does_not(tmp_path: Path) -> None:
    cheap = [Line(((group,) * 40 + (i,),), expect=1.0) for group in range(8) for i in range(10)]
    plan = plan_of(cheap, tmp_path / "cheap")
    supply = Dealt(plan, everybody, 2)
    first = 0
    while supply.next(0, [0, 0]) is not None:
        first += 1
    assert supply.moved > 0 and 60 < first < 80, "nobody else asked; the last rows are not worth their prefix"
    assert supply.next(1, [0, 0]) is not None
    dear = [Line(((7,) * 4000 + (i,),), expect=1.0) for i in range(20)]
    plan = plan_of(dear, tmp_path / "dear")
    supply = Dealt(plan, everybody, 2)
    while (unit := supply.next(0, [0, 0])) is not None:
        assert unit.position < 20
    assert supply.moved == 0, "the prefix costs more than all the rows"


def test_most_of_what_is_left_stays_to_be_taken_over(tmp_path: Path) -> None:
    plan = plan_of([Line(((i % 7, i),)) for i in range(3000)], tmp_path)
    supply = Dealt(plan, everybody, 2, least=16)
    assert 350 < supply.room(0, 0) < 400, "a quarter of its half"
    assert supply.room(0, 500) == 0, "enough wait already"
    while (room := supply.room(0, 0)) > 16:
        for _ in range(room):
            supply.next(0, [0, 0])
    assert InTurn(iter(())).room(0, 0) == WINDOW


def test_in_turn_the_idler_engine_gets_the_next(tmp_path: Path) -> None:
    plan = plan_of([Line(((i,),)) for i in range(10)], tmp_path)
    supply = InTurn(plan.units_from(), 2)
    assert supply.next(0, [100, 0]) is None and not supply.over
    assert supply.next(1, [100, 0]) is not None
    assert supply.next(0, [10, 0]) is not None


def test_a_plan_without_units_is_over(tmp_path: Path) -> None:
    plan: Plan = plan_of([Line((), error="bad")], tmp_path)
    supply = Dealt(plan, everybody, 2)
    assert supply.over and supply.next(0, [0, 0]) is None and supply.room(1, 0) > 0
