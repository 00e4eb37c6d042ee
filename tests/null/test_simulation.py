"""The simulator is the engine with a pretend executor: it knows lengths, and the scheduler does not."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array

import pytest

from shoal.core.clock import SimClock
from shoal.core.types import Request, Sampling
from shoal.engine import Engine
from shoal.sched.cost import LinearCost
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor


def simulate(policy: Policy, count: int, blocks: int, ahead: int, seed: int = 5):
    """Lengths that came out, the truth, and the scheduler, of one seeded job with drafts or without."""
    luck = random.Random(seed)
    clock = SimClock()
    truth = {f"r{i}": luck.randrange(1, 50) for i in range(count)}
    scheduler = Scheduler(policy, blocks, 16)
    engine = Engine(scheduler, SimExecutor(clock, LinearCost(), truth), clock, ahead)
    for i in range(count):
        prompt = array("i", [luck.randrange(2, 5000) for _ in range(20)])
        engine.add(Request(f"r{i}", prompt, Sampling(max_tokens=60, stop=frozenset({1})), index=i, future=()))
    got = dict.fromkeys(truth, 0)
    while engine.busy:
        for out in engine.step():
            got[out.id] += len(out.tokens)
    return got, truth, scheduler, clock.now()


class Drafting(Policy):
    def draft(self, seq, view):
        return 3


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", [Policy, BatchPolicy, Drafting], ids=lambda p: p.__name__)
def test_only_the_executor_knows_when_a_text_ends(policy, ahead):
    got, truth, _, _ = simulate(policy(), 60, 70, ahead)
    assert got == truth


def test_the_same_seed_simulates_the_same_seconds():
    runs = [simulate(BatchPolicy(Budget(64, 16)), 80, 60, 1) for _ in range(2)]
    assert runs[0][3] == runs[1][3] and runs[0][2].counters == runs[1][2].counters
    assert simulate(BatchPolicy(Budget(64, 16)), 80, 60, 1, seed=6)[3] != runs[0][3]


def test_learnt_lengths_admit_more_rows_than_limits_and_preempt_few():
    """The limit is 60 tokens and the average 25: a policy that reserves the limit runs fewer rows at once."""

    class Reserving(BatchPolicy):
        def _expect(self, seq):
            return seq.request.sampling.max_tokens

    _, _, learnt, seconds = simulate(BatchPolicy(Budget(256, 64)), 300, 80, 1)
    _, _, reserved, longer = simulate(Reserving(Budget(256, 64)), 300, 80, 1)
    assert learnt.counters.steps < reserved.counters.steps and seconds < longer
    assert reserved.counters.preemptions == 0
    assert learnt.counters.preemptions < 30


def test_ten_thousand_requests_simulate_without_torch():
    code = (
        "import sys, benchmarks.prove_scheduler as p;"
        "p_ = p.simulate(); assert not p_['torch_loaded'] and p_['seconds'] < 120, p_"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
