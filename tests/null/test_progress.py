"""Every job comes to its end: what preemptions cost is bounded, whatever the policy prefers and the memory holds."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

import pytest
from adversary import EVERY, Level

from shoal.core.clock import SimClock
from shoal.core.types import Answer, Request, Sampling
from shoal.engine import Engine
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor

LEAST = 1.0  # of the blocks that the largest row fills: nothing less could end


def job(seed: int, count: int) -> list[Request]:
    """Short rows and long ones, a few of them scored only or wanting a vector: these gain nothing before their end."""
    luck, requests = random.Random(seed), []
    for i in range(count):
        prompt = array("i", [luck.randrange(2, 5000) for _ in range(luck.choice([3, 20, 30, 60, 400]))])
        more: dict = {"guess": float(luck.randrange(1, 40))}
        if luck.random() < 0.1:
            more["answer"] = Answer.VECTOR
        elif luck.random() < 0.1:
            more["score_from"] = 1
        requests.append(Request(f"r{i}", prompt, Sampling(max_tokens=luck.choice([1, 12, 17, 25, 40])), **more))
    return requests


@dataclass
class Cost:
    """What a job came to."""

    computed: int = 0  # tokens
    steps: int = 0
    preemptions: int = 0
    vain: int = 0  # preemptions
    together: int = 1  # rows that ran at once


def ended(requests, policy, block, tokens, ahead, memory=LEAST, reuse=False) -> Cost:
    """Run the job to its end. What is said of the cost holds at every step, so a job without end fails soon."""
    longest = max(limit(r) for r in requests)
    clock = SimClock()
    policy.limit = Budget(tokens, 512)
    scheduler = Scheduler(policy, int(memory * -(-longest // block)), block, reuse)
    engine = Engine(scheduler, EchoExecutor(scheduler.kv.pool.num_blocks, block, clock), clock, ahead)
    for r in requests:
        assert engine.add(r) is None
    cost, idle, most = Cost(), 0, bound(requests, block)
    while engine.busy:
        before = scheduler.steps
        engine.step()
        idle = idle + 1 if scheduler.steps == before and engine.wait_until is None else 0
        if engine.wait_until is not None:
            clock.advance_to(engine.wait_until)
        counters = scheduler.counters
        cost = Cost(
            counters.prompt_computed + counters.output_computed, counters.steps, counters.preemptions, counters.vain,
            max(cost.together, len(scheduler.running)),
        )  # fmt: skip
        assert cost.vain <= len(requests) * (cost.together - 1), cost
        assert cost.computed <= most + cost.vain * longest, cost
        assert cost.steps <= cost.computed and idle <= ahead + 1, cost
    return cost


def limit(r: Request) -> int:
    return r.goal + (r.sampling.max_tokens if r.samples else 0)


def bound(requests, block: int) -> int:
    """The most tokens a job computes, rows apart that lose their memory in vain: each row once, and once again for its
    first preemption; and a block for each token of its answer, with which it repays the later ones."""
    lengths = [limit(r) for r in requests]
    answers = sum(r.sampling.max_tokens for r in requests if r.samples)
    return 2 * sum(lengths) + block * answers


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("reuse", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("policy", EVERY, ids=lambda p: p.__name__)
def test_what_preemptions_cost_is_bounded_whatever_the_policy(policy, reuse, ahead):
    luck = random.Random(ahead)
    for seed in range(6):
        block, tokens = luck.choice([4, 16, 32]), luck.choice([7, 32, 100])
        requests = job(seed, 40)
        ended(requests, policy(), block, tokens, ahead, luck.choice([LEAST, 1.5]), reuse)


def test_two_rows_that_overtake_each_other_do_not_do_so_for_ever():
    """Each would lose its memory to the other while its next token is in flight."""
    requests = [Request(f"r{i}", array("i", range(2, 402)), Sampling(max_tokens=40)) for i in range(2)]
    cost = ended(requests, Level(), 16, 32, 1)
    assert cost.computed < 3 * sum(limit(r) for r in requests)


def test_a_row_that_was_preempted_keeps_its_memory_until_it_has_repaid_that():
    """It has to produce a token for each block that it computes again; the first time costs nothing."""
    scheduler = Scheduler(Policy(), 8, 4, reuse=False)
    engine = Engine(scheduler, EchoExecutor(8, 4), SimClock())
    assert engine.add(Request("r", array("i", range(2, 14)), Sampling(max_tokens=20))) is None
    engine.step()
    (row,) = scheduler.live()
    assert row.yields and row.produced == 1
    scheduler.preempt(row)
    engine.step()  # computes 13 tokens, which are 4 blocks, and produces one
    for produced in (2, 3, 4):
        assert row.produced == produced and not row.yields
        engine.step()
    assert row.produced == 5 and row.yields and not scheduler.counters.vain


def test_rows_that_all_keep_their_memory_give_way_to_the_one_that_runs_longest():
    """And none starts again before one has ended, or it would only be taken from again."""

    class Pieces(Policy):
        def chunk(self, seq, room, view):
            return min(4, seq.pending, room)

    requests = [Request(f"r{i}", array("i", range(2, 10)), Sampling(max_tokens=24)) for i in range(4)]
    scheduler = Scheduler(Pieces(), 8, 4, reuse=False)
    engine = Engine(scheduler, EchoExecutor(8, 4), SimClock())
    for r in requests:
        engine.add(r)
    while len(scheduler.running) < 2:
        engine.step()
    for row in list(scheduler.running.values()):
        row.keep_until = 1000
    first, *others = sorted(scheduler.running.values(), key=lambda row: row.ticket)
    while not scheduler.overfull:
        engine.step()
    assert first.running and scheduler.counters.vain == 1 and not others[-1].running
    waiting = set(scheduler.waiting)
    while scheduler.overfull:
        assert waiting <= set(scheduler.waiting)
        engine.step()
    assert not first.running and len(scheduler.live()) == 3
    while engine.busy:
        engine.step()
