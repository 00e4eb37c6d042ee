"""What every policy owes, whatever it prefers: all requests end once, blocks are conserved, nobody is left standing."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import COST, mixture, serve, whole
from test_scheduler import reference, run, workload

from shoal.core.clock import SimClock
from shoal.core.types import Finish, Promise
from shoal.engine import Engine
from shoal.sched.cost import LinearCost
from shoal.sched.policies import POLICIES, find_policy
from shoal.sched.policies.orders import Ordered
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

NAMES = sorted(POLICIES)
PROMISE = Promise(1.0, 0.02)


def make(name: str, limit: Budget | None = None) -> Policy:
    """The policy with all that it takes of a limit, a cost and a promise."""
    cls = find_policy(name)
    given = {"limit": limit, "cost": LinearCost(), "promise": PROMISE}
    return cls(**{key: value for key, value in given.items() if key in inspect.signature(cls).parameters})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_policy_that_needs_no_argument_and_takes_them_by_name(name):
    assert issubclass(find_policy(name), Policy)
    assert isinstance(find_policy(name)(), Policy)
    assert make(name, Budget(64, 4)).limit == Budget(64, 4)


def test_a_name_that_is_none_says_which_there_are():
    with pytest.raises(ValueError, match="stall-free"):
        find_policy("stallfree")
    with pytest.raises(ValueError, match="not a Policy"):
        find_policy("math:pi")


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("name", NAMES)
def test_no_policy_changes_what_a_text_is(name, ahead):
    for seed, num_blocks in ((0, 26), (1, 60), (2, 400)):
        requests = workload(seed)
        got, ends, _ = run(requests, make(name, Budget(48, 12)), num_blocks, ahead)
        for r in requests:
            assert got[r.id]["tokens"] == reference(r), r.id
            assert ends[r.id] in (Finish.STOP, Finish.LENGTH)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=36, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 30), blocks=st.sampled_from([24, 40, 90, 300]), tokens=st.sampled_from([16, 100, 2000]),
    seats=st.sampled_from([2, 7, 64]), ahead=st.booleans(), rate=st.sampled_from([5.0, 40.0, 400.0]),
)  # fmt: skip
def test_every_request_ends_once_and_starts_before_all_work_could_have_been_done_twice(
    name, seed, blocks, tokens, seats, ahead, rate
):
    """Over 500 random workloads together. `serve` looks at budgets, blocks and ends in every step."""
    requests, lengths = mixture(seed, 24, 50, rate)
    served = serve(make(name, Budget(tokens, seats)), requests, lengths, blocks, 16, ahead=int(ahead), audit=True)
    whole(served, lengths)
    assert Counter(out.finish is not None for out in served.ends.values()) == {True: len(requests)}
    alone = sum((1 + -(-len(r.prompt) // min(tokens, 16)) + lengths[r.id]) * 6e-3 for r in requests)
    for r in requests:
        if served.ends[r.id].finish is not Finish.REJECT:
            assert served.start(r.id) - r.arrival <= 2 * alone, r.id


@pytest.mark.parametrize("name", NAMES)
def test_the_same_requests_make_the_same_plans(name):
    requests, lengths = mixture(3, 40)
    first, second = (serve(make(name), requests, lengths, 60, cost=COST) for _ in range(2))
    assert first.steps == second.steps


@pytest.mark.parametrize("name", NAMES)
def test_nothing_a_policy_sees_tells_a_length_before_it_has_come(name):
    """Two runs whose lengths differ from some token on make the same plans until the first text has ended."""
    requests, lengths = mixture(4, 30, limit=60)
    longer = {id: length + 7 for id, length in lengths.items()}
    first, second = (serve(make(name), requests, some, 300) for some in (lengths, longer))
    until = min(served.ends[r.id].timing["end"] for served in (first, second) for r in requests)
    before = [[step for when, step in served.steps if when < until] for served in (first, second)]
    assert len(before[0]) > 2
    assert before[0] == before[1]


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(find_policy(name), "steady")])
def test_while_a_policy_says_it_is_steady_all_that_decode_have_a_token_in_every_plan(name):
    """What a simulation may then take at once: no budget, order or admission stands in the way."""
    requests, lengths = mixture(6, 30, 60, 1000.0)
    clock = SimClock()
    policy = make(name, Budget(96, 24))
    scheduler = Scheduler(policy, 600, 16)
    engine = Engine(scheduler, SimExecutor(clock, COST, lengths), clock)
    for request in requests:
        engine.add(request)
    calm = 0
    while engine.busy:
        view = scheduler.view(clock.now())
        steady = policy.steady(view) > 0 and all(seq.pending == 1 for seq in view.running)
        running = len(view.running)
        engine.step()
        if steady:
            calm += 1
            assert len(engine.last.slices) == engine.last.num_tokens == running
    assert calm > 5 or isinstance(policy, Ordered)
