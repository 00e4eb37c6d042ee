"""What is learnt from steps is what they were made of; a run that is repeated from its record plans the same."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.clock import SimClock
from shoal.core.types import TOKEN, Finish, Request, Sampling
from shoal.engine import Engine
from shoal.sched.cost import LinearCost
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor
from shoal.sim.fit import Timed, fit_cost, fit_linear, nonnegative, search
from shoal.sim.replay import Recorder, Replay, open_loop, written

numbers = st.floats(-10, 10, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=4, max_size=12))
def test_no_small_change_of_the_weights_comes_closer(rows):
    table = np.array(rows)
    amounts, seconds = table[:, :3], table[:, 3]
    found = nonnegative(amounts, seconds)
    assert (found >= 0).all()
    least = float(((amounts @ found - seconds) ** 2).sum())
    for place in range(3):
        for change in (1e-3, -1e-3):
            other = found.copy()
            other[place] = max(0.0, other[place] + change)
            assert float(((amounts @ other - seconds) ** 2).sum()) >= least - 1e-6


def steps(count: int, luck: random.Random) -> list[Timed]:
    made = []
    for _ in range(count):
        tokens, rows = luck.randrange(1, 500), luck.randrange(1, 60)
        read, pairs, starts = luck.randrange(9000), luck.randrange(90000), luck.randrange(5)
        seconds = 2e-3 + 3e-5 * tokens + 4e-8 * read + 5e-9 * pairs + 6e-6 * rows + 7e-6 * starts
        made.append(Timed(tokens, read, pairs, rows, starts, seconds))
    return made


def test_a_cost_is_found_again_from_steps_that_took_it():
    cost = fit_cost(steps(200, random.Random(1)))
    found = (cost.step, cost.token, cost.read, cost.pair, cost.row, cost.start)
    assert found == pytest.approx((2e-3, 3e-5, 4e-8, 5e-9, 6e-6, 7e-6), rel=1e-6)
    only = [each._replace(seconds=1e-3 + 2e-5 * each.tokens) for each in steps(50, random.Random(2))]
    assert fit_linear(only).weights == pytest.approx((1e-3, 2e-5, 0, 0), abs=1e-11)
    with pytest.raises(ValueError, match="no steps"):
        fit_cost([])


def test_a_search_finds_the_least_within_its_bounds():
    found = search(lambda x: (x["a"] - 3) ** 2 + (x["b"] - 5) ** 2, {"a": 1.0, "b": 1.0}, {"b": 2.0})
    assert found["a"] == pytest.approx(3, rel=0.01) and found["b"] == 2.0


def arrivals(count: int, luck: random.Random) -> list[Request]:
    found, when = [], 0.0
    for i in range(count):
        when += luck.expovariate(40)
        prompt = array(TOKEN, [luck.randrange(2, 900) for _ in range(luck.randrange(1, 60))])
        found.append(Request(f"r{i}", prompt, Sampling(max_tokens=luck.randrange(1, 30)), arrival=when, index=i))
    return found


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", [Policy, BatchPolicy], ids=lambda p: p.__name__)
@pytest.mark.parametrize("blocks", [40, 400])
def test_a_run_that_is_told_the_same_plans_the_same(policy, ahead, blocks):
    requests = arrivals(60, random.Random(3))

    def engine(clock, executor):
        return Engine(Scheduler(policy(Budget(64, 16)), blocks, 4), executor, clock, ahead)

    clock = SimClock()
    recorder = Recorder(clock, SimExecutor(clock, LinearCost()))
    news = open_loop(engine(recorder, recorder), requests, clock.advance_to)
    record = recorder.record
    assert sum(output.finish is Finish.LENGTH for _, output in news) == 60
    assert all(when >= 0 for when, _ in news) and len(record.plans) == len(record.results) == len(record.steps)
    replay = Replay(record)
    open_loop(engine(replay, replay), requests, lambda until: None)
    assert written(replay.plans) == written(record.plans)

    other = Replay(record)
    longer = Sampling(max_tokens=requests[30].sampling.max_tokens + 1)
    changed = [replace(each, sampling=longer) if each.index == 30 else each for each in requests]
    with pytest.raises((ValueError, KeyError, AssertionError)):
        open_loop(engine(other, other), changed, lambda until: None)
        assert written(other.plans) == written(record.plans)


def test_steps_are_timed_from_the_end_of_the_one_before():
    requests = arrivals(40, random.Random(4))
    cost, clock = LinearCost((5e-3, 1e-4, 0.0, 0.0)), SimClock()
    recorder = Recorder(clock, SimExecutor(clock, cost))
    open_loop(Engine(Scheduler(Policy(Budget(64, 16)), 400, 4), recorder, recorder, 1), requests, clock.advance_to)
    assert fit_linear(recorder.record.steps).weights == pytest.approx(cost.weights, abs=1e-9)


def test_nobody_starts_before_arriving():
    requests = arrivals(40, random.Random(5))
    clock = SimClock()
    engine = Engine(Scheduler(Policy(Budget(64, 16)), 400, 4), SimExecutor(clock, LinearCost()), clock, 1)
    ends = [output for _, output in open_loop(engine, requests, clock.advance_to) if output.finish]
    assert all(output.timing["start"] >= output.timing["arrival"] for output in ends)
