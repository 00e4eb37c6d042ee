"""A long prompt on the real engine: those who are being answered wait for a step, not for the prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.prove_policies import build, compare, missing, pace, stall, whole
from shoal.build import BuiltEngine, make_policy
from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.core.types import Promise
from shoal.kernels import set_threads
from shoal.sched.cost import LinearCost
from shoal.sched.policies import POLICIES, find_policy
from shoal.sched.policies.past_future import PastFuture
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget


@pytest.fixture(scope="module")
def built() -> Iterator[BuiltEngine]:
    before = torch.get_num_threads()
    made = build(threads=1)
    yield made
    made.close()
    set_threads(before)


def test_the_worst_gap_falls_at_least_four_times_and_no_token_differs(built: BuiltEngine) -> None:
    found = compare(built, 2)
    assert found["same_tokens"] == 1.0
    assert found["ratio"] >= 4.0, found


def test_a_configuration_names_a_policy() -> None:
    assert isinstance(make_policy(EngineConfig(policy="past-future", step_tokens=512)), PastFuture)
    with pytest.raises(UsageError, match="a cost and a promise"):
        make_policy(EngineConfig(policy="stall-free", step_tokens=512))
    with pytest.raises(UsageError, match="just-in-time"):
        make_policy(EngineConfig(policy="no-such"))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_named_policy_changes_a_token(built: BuiltEngine, name: str) -> None:
    calm = stall(built, whole(), 300, 24).tokens
    policy = find_policy(name)(limit=Budget(512, 8))
    assert stall(built, policy, 300, 24).tokens == calm


def test_a_promise_and_a_cost_choose_the_budget(built: BuiltEngine) -> None:
    cost = LinearCost((1e-3, 1e-4, 0.0, 0.0))
    policy = StallFree(Budget(4096, 64), cost=cost, promise=Promise(1.0, 0.01), tile=16)
    assert policy._budgets is not None and policy._budgets.tokens(0.01, 8, 50, 50) == 80
    assert stall(built, policy, 300, 24).tokens == stall(built, whole(), 300, 24).tokens


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_all_run_whose_plans_are_timed(name: str) -> None:
    found = pace(name, running=40, steps=4)
    assert found["running"] == 40 and found.get("pins", 1) > 0


def test_a_policy_that_is_slow_or_not_full_or_not_measured_is_missing() -> None:
    good = {"running": 1000, "median_cpu_ms": 4.0, "p90_cpu_ms": 4.9, "median_wall_ms": 9.0, "p90_wall_ms": 9.0}
    plans = dict.fromkeys(POLICIES, good)
    assert not missing(plans)
    for change in ({"running": 999}, {"median_cpu_ms": 5.0}, {"p90_cpu_ms": 5.0}, {"pins": 0}):
        assert len(missing({**plans, "batch": {**good, **change}})) == 1
    assert len(missing({name: good for name in POLICIES if name != "mixed"})) == 1
