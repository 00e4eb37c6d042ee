"""The peak of memory to come, against a scan of every step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sched.forecast import LAG, Futures, Growth, MemoryForecast

ONE = st.tuples(
    st.integers(0, 40),  # remaining
    st.integers(1, 90),  # tokens
    st.integers(0, 12),  # steps until its prompt is computed
    st.sampled_from([1, 2, 4]),  # tokens a step
    st.integers(0, 4),  # slots
    st.sampled_from([-1, -1, 0, 1]),  # prefix
)
PREFIX = {0: 3, 1: 5}  # blocks


def scan(base: int, members, size: int) -> float:
    """The same by walking through every step, each member's tokens as they are then."""
    ends = [wait + math.ceil(remaining / pace) for remaining, _, wait, pace, _, _ in members]
    worst = float(base)
    for x in range(max(ends, default=-1) + 1):
        memory = float(base)
        alive = [m for m, end in zip(members, ends, strict=True) if end >= x]
        for _, tokens, wait, pace, slots, prefix in alive:
            grown = pace * max(0, x - wait)
            memory += (tokens + slots + LAG + size - 1 + grown) / size - PREFIX.get(prefix, 0)
        memory += sum(PREFIX[p] for p in {m[5] for m in alive} if p >= 0)
        worst = max(worst, memory)
    return worst


def futures_of(members, size: int) -> Futures:
    futures = Futures(size)
    for remaining, tokens, wait, pace, slots, prefix in members:
        futures.push(
            remaining, tokens, wait=wait, pace=pace, slots=slots, prefix=prefix, prefix_blocks=PREFIX.get(prefix, 0)
        )
    return futures


@settings(max_examples=2000, deadline=None)
@given(members=st.lists(ONE, max_size=9), size=st.sampled_from([1, 4, 16]), base=st.integers(0, 9))
def test_looking_at_ends_alone_is_as_good_as_looking_at_every_step(members, size, base):
    members = [(r, t + size * PREFIX.get(p, 0), w, s, k, p) for r, t, w, s, k, p in members]
    assert futures_of(members, size).peak(base) == pytest.approx(scan(base, members, size))


@settings(max_examples=300, deadline=None)
@given(
    plain=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 200), st.integers(0, 3)), max_size=12),
    size=st.sampled_from([1, 16]),
)
def test_with_one_token_a_step_it_is_the_forecast_of_batches(plain, size):
    growths = [Growth(r, t + size * s, s) for r, t, s in plain]
    futures = Futures(size)
    for g in growths:
        futures.push(g.remaining, g.tokens, g.shared_blocks)
    assert futures.peak(7) == pytest.approx(MemoryForecast(size).peak(7, growths))


@settings(max_examples=200, deadline=None)
@given(members=st.lists(ONE, min_size=1, max_size=40), size=st.sampled_from([4, 16]))
def test_what_was_pushed_can_be_popped(members, size):
    members = [(r, t + size * PREFIX.get(p, 0), w, s, k, p) for r, t, w, s, k, p in members]
    futures = futures_of(members[:-1], size)
    before = futures.peak(0)
    r, t, w, s, k, p = members[-1]
    futures.push(r, t, wait=w, pace=s, slots=k, prefix=p, prefix_blocks=PREFIX.get(p, 0))
    assert futures.peak(0) >= before - 1e-9 and len(futures) == len(members)
    futures.pop()
    assert futures.peak(0) == before


def test_the_worst_of_several_futures_counts_and_many_are_one_by_one():
    luck = np.random.default_rng(1)
    remaining = luck.integers(0, 50, (5, 30)).astype(float)
    tokens, shared = luck.integers(10, 200, 30).astype(float), luck.integers(0, 3, 30).astype(float)
    wait = luck.integers(0, 9, 30).astype(float)
    together = Futures(16, 5)
    together.extend(remaining, tokens, shared, wait)
    singly = []
    for row in remaining:
        alone = Futures(16)
        for r, t, s, w in zip(row, tokens, shared, wait, strict=True):
            alone.push(r, int(t), int(s), wait=w)
        singly.append(alone.peak(4))
    assert together.peak(4) == pytest.approx(max(singly))


def test_a_prompt_that_is_not_computed_yet_ends_later_and_drafts_end_sooner():
    def peak(**more):
        futures = Futures(1)
        futures.push(50, 100)
        futures.push(50, 100, **more)
        return futures.peak(0)

    assert peak(pace=4.0) < peak() <= peak(slots=5) == peak() + 5


def test_a_prefix_is_counted_once_and_as_long_as_anybody_uses_it():
    futures = Futures(1)
    for remaining in (10, 20, 30):
        futures.push(remaining, 120, prefix=3, prefix_blocks=100)
    assert futures.peak(0) == pytest.approx(100 + max(3 * (21 + 10), 2 * (21 + 20), 21 + 30))


def test_half_a_block_of_waste_is_less_than_a_whole_one():
    most, usual = Futures(16), Futures(16, waste=7.5)
    for futures in (most, usual):
        for _ in range(10):
            futures.push(40, 100)
    assert most.peak(0) - usual.peak(0) == pytest.approx(10 * 7.5 / 16)
