"""Times of simulated requests, the five goodputs, intervals and capacity: each by its definition."""

from __future__ import annotations

import math
import random
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.types import Finish, Promise
from shoal.sim import metrics
from shoal.sim.capacity import capacity
from shoal.sim.record import Record


def record(times, arrival=0.0, finish=Finish.STOP, **more) -> Record:
    made = Record("r", arrival, 10, 100, **more)
    made.times, made.finish, made.start = array("d", times), finish, arrival
    made.end = times[-1] if times else math.nan
    return made


def test_times_of_one_request():
    one = record([2.0, 2.5, 2.5, 4.0], arrival=1.5)
    assert metrics.first_token(one) == 0.5
    assert metrics.gaps(one).tolist() == [0.5, 0.0, 1.5]
    assert metrics.worst_gap(one) == 1.5
    assert metrics.per_token(one) == pytest.approx(2 / 3)
    assert metrics.end_to_end(one) == 2.5


def test_who_has_no_token_has_waited_for_ever():
    none = record([], finish=None)
    assert metrics.first_token(none) == metrics.worst_gap(none) == metrics.per_token(none) == math.inf
    found = metrics.summary([record([1.0, 2.0]), none])
    assert found.ttft.p99 == math.inf and found.unfinished == 1 and found.answered == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_straight_between_ranks(values, percent):
    assert metrics.percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_percentiles_of_nothing_and_beside_infinity():
    assert math.isnan(metrics.percentile([], 50))
    assert metrics.percentile([1.0, math.inf], 0) == 1.0
    assert metrics.percentile([1.0, math.inf, math.inf], 75) == math.inf


def test_the_interval_holds_the_mean_as_often_as_it_says():
    luck, held = random.Random(1), 0
    for _ in range(2000):
        found = metrics.interval(luck.gauss(3.0, 2.0) for _ in range(5))
        held += abs(found.mean - 3.0) <= found.half
    assert 0.93 < held / 2000 < 0.97
    assert math.isnan(metrics.interval([1.0]).half)


def test_five_goodputs_are_five_things():
    quick, stalled = record([1.0, 1.1, 1.2]), record([1.0, 1.1, 4.0])
    late = record([9.0, 9.1, 9.2])
    some = [quick, stalled, late]
    assert metrics.timely(some, 5.0, 1.0).share == pytest.approx(1 / 3)  # the worst gap counts
    assert metrics.attained(some, 5.0, 1.6) == pytest.approx(2 / 3)  # the mean gap counts: (4.0 - 1.0) / 2
    assert not metrics.flowing(some, 1.0) and metrics.flowing([quick] * 99 + [late], 1.0)
    assert metrics.emitted(some) == pytest.approx(9 / 9.2)


def test_a_promise_is_kept_token_by_token_and_a_deadline_as_a_whole():
    promise = Promise(1.0, 0.5)
    some = [
        record([1.0, 1.5, 2.5], promise=promise),  # two of three in time
        record([1.0, 8.0], deadline=7.0), record([1.0, 6.0], deadline=7.0),
        record([1.0], program="p", deadline=2.0), record([1.0, 9.0], program="p", deadline=2.0),
        record([1.0, 3.0]),
    ]  # fmt: skip
    found = metrics.in_service(some)
    seconds = 9.0
    assert found["promise"].tokens == pytest.approx(2 / seconds) and found["promise"].share == 0.0
    assert found["deadline"].tokens == pytest.approx(2 / seconds) and found["deadline"].share == 0.5
    assert found["program"].tokens == 0.0  # one of its turns was late
    assert found["none"].share == 1.0
    assert metrics.jobs(some) == {"p": 9.0}


def test_goodput_of_unpromised_tokens_is_nobodys():
    only_first = record([0.5, 9.0], promise=Promise(1.0))
    assert metrics.in_service([only_first])["promise"].share == 1.0


# -- capacity ----------------------------------------------------------------------------------------


@given(st.floats(0.01, 5000.0), st.floats(0.01, 100.0))
def test_capacity_is_found_to_its_tolerance(true, guess):
    found = capacity(lambda rate: rate <= true, guess)
    assert found.monotone and found.rate <= true < found.rate * 1.026


def test_a_rate_that_fails_by_bad_luck_below_the_answer_is_seen():
    found = capacity(lambda rate: rate <= 10.0 and not 7.0 < rate < 9.0, 10.0)
    assert not found.monotone and found.rate <= 7.0


def test_a_condition_that_no_rate_meets_has_no_capacity():
    found = capacity(lambda rate: False, 1.0)
    assert found.rate == 0.0 and len(found.tried) <= 40
