"""Prompts are computed beside decodes that would not fill a step, and no later than their answers allow."""

from __future__ import annotations

import random
from array import array

import pytest

from shoal.core.clock import SimClock
from shoal.core.types import Request, Sampling
from shoal.engine import Engine
from shoal.sched.policies.batch import FEW, STEP_COST, BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

Row = tuple[int, int]  # prompt and answer tokens


class AtOnce(BatchPolicy):
    """The control: every step as full as it may be."""

    def budget(self, view):
        super().budget(view)
        return self.limit


class Roofline:
    """A step reads all weights, in the time of STEP_COST tokens; more tokens than that take their own."""

    def seconds(self, step):
        return float(max(STEP_COST, sum(len(part.tokens) for part in step.slices)))


def simulate(policy: BatchPolicy, rows: list[Row], stop: frozenset[int] = frozenset(), blocks: int = 9000):
    """(seconds, tokens of every step, preemptions)."""
    clock, luck = SimClock(), random.Random(1)
    scheduler = Scheduler(policy, blocks, 16)
    truth = {f"r{i}": answer for i, (_, answer) in enumerate(rows)}
    engine = Engine(scheduler, SimExecutor(clock, Roofline(), truth), clock)
    for i, (prompt, answer) in enumerate(rows):
        tokens = array("i", [luck.randrange(2, 5000) for _ in range(prompt)])
        engine.add(Request(f"r{i}", tokens, Sampling(max_tokens=answer, stop=stop), index=i, future=()))
    sizes = []
    while engine.busy:
        engine.step()
        if engine.last is not None:
            sizes.append(engine.last.num_tokens)
    return clock.now(), sizes, scheduler.counters.preemptions


def some_rows(seed: int, most: int) -> list[Row]:
    """As a plan serves unrelated rows: most answer for each prompt token first."""
    luck = random.Random(seed)
    rows = [
        (min(600, int(luck.lognormvariate(5, 0.6)) + 1), min(400, int(luck.lognormvariate(4, 0.7)) + 1))
        for _ in range(luck.randrange(1, most))
    ]
    return sorted(rows, key=lambda row: -row[1] / row[0])


@pytest.mark.parametrize("seed", range(12))
def test_even_steps_are_never_much_slower_and_end_as_soon(seed):
    rows = some_rows(seed, 120)
    even, sizes, preempted = simulate(BatchPolicy(Budget(2048, 512)), rows)
    once, control, _ = simulate(AtOnce(Budget(2048, 512)), rows)
    assert preempted == 0
    assert even <= once * 1.02 + STEP_COST
    assert len(sizes) <= len(control) + len(rows) // 8 + 1


def test_a_small_file_of_unlike_answers_takes_a_tenth_less():
    rows = some_rows(3, 120)[:64]
    even, once = (simulate(policy(Budget(2048, 512)), rows)[0] for policy in (BatchPolicy, AtOnce))
    assert even < 0.9 * once, (even, once)


def test_answers_of_one_length_leave_nothing_to_put_off():
    rows = [(200, 32)] * 64
    assert simulate(BatchPolicy(Budget(2048, 512)), rows)[:2] == simulate(AtOnce(Budget(2048, 512)), rows)[:2]


@pytest.mark.parametrize(("count", "stop"), [(FEW + 60, frozenset()), (40, frozenset({1}))], ids=["many", "uncertain"])
def test_what_nobody_can_foresee_is_not_put_off(count, stop):
    """Behind many waiting rows more may come, and a row that may stop gives no time to count on."""
    rows = [(100, 300), *[(100, 20)] * (count - 1)]
    (_, even, _), (_, once, _) = (simulate(policy(Budget(2048, 512)), rows, stop) for policy in (BatchPolicy, AtOnce))
    assert even[0] == once[0] == 2048


def test_little_memory_is_still_enough():
    rows = some_rows(5, 120)
    seconds, _, preempted = simulate(BatchPolicy(Budget(2048, 512)), rows, blocks=90)
    control, _, _ = simulate(AtOnce(Budget(2048, 512)), rows, blocks=90)
    assert preempted == 0 and seconds <= control * 1.02 + STEP_COST
