"""A row that must compute what the cache holds already needs no more memory than its own tokens."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from shoal.core.clock import SimClock
from shoal.core.types import Finish, Request, Sampling
from shoal.engine import Engine
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor, reference


@pytest.mark.parametrize("policy", [Policy, BatchPolicy], ids=lambda each: each.__name__)
@pytest.mark.parametrize("known", [False, True], ids=["unplanned", "planned"])
def test_a_scored_row_starts_behind_an_idle_prefix_that_memory_cannot_hold_twice(policy, known):
    clock, prefix = SimClock(), list(range(10, 74))
    first = Request("first", array("i", [*prefix, 1]), Sampling(max_tokens=2), index=0, future=((64, 1),))
    scored = Request("scored", array("i", [*prefix, 2, 3]), Sampling(max_tokens=2), index=1, score_from=1, future=())
    engine = Engine(Scheduler(policy(), 6, 16), EchoExecutor(6, 16, clock), clock)
    for request in (first, scored):
        request = request if known else replace(request, future=None)
        assert engine.add(request) is None
        outputs = [out for _ in range(20) for out in engine.step()]
        assert outputs and outputs[-1].finish in (Finish.STOP, Finish.LENGTH)
        assert [token for out in outputs for token in out.tokens] == reference(request)
