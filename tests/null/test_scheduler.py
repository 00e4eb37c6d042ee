"""Every policy, tiny memory, random requests: nothing is lost, nothing leaks, and the text is right."""

from __future__ import annotations

import random
from array import array

import pytest
from adversary import EVERY

from shoal.core.clock import SimClock
from shoal.core.types import Answer, Finish, Request, Sampling
from shoal.engine import Engine
from shoal.sched.policy import Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor, reference

BLOCK = 4


def request(id: str, prompt, sampling: Sampling | None = None, **more) -> Request:
    return Request(id, array("i", prompt), sampling or Sampling(max_tokens=4), **more)


def workload(seed: int, count: int = 40) -> list[Request]:
    """Rows behind shared heads of odd lengths, some of them equal, some only scored, some wanting a vector."""
    luck = random.Random(seed)
    heads = [[luck.randrange(2, 50) for _ in range(luck.randrange(1, 40))] for _ in range(3)]
    heads.append(heads[0][: len(heads[0]) // 2 + 1] + [luck.randrange(2, 50) for _ in range(9)])
    requests = []
    for i in range(count):
        head, own = luck.choice(heads), [luck.randrange(2, 5) for _ in range(luck.randrange(0, 12))]
        sampling = Sampling(
            max_tokens=luck.randrange(1, 25),
            min_tokens=luck.choice([0, 0, 5]),
            stop=frozenset({7, 9}),
            seed=luck.randrange(3),
            sample=luck.randrange(2),
        )
        more: dict = {"adapter": luck.choice(["", "", "fish"]), "guess": float(luck.randrange(1, 25))}
        kind = luck.randrange(12)
        if kind == 0:
            more["answer"] = Answer.VECTOR
        elif kind in (1, 2) and len(head + own) > 1:
            more["score_from"] = luck.randrange(1, len(head + own))
            if kind == 2:
                sampling = Sampling(max_tokens=0)
        requests.append(request(f"r{i:03}", head + own, sampling, arrival=luck.random() * 0.5, **more))
    return requests


def run(requests, policy, num_blocks, ahead=0, reuse=True, block=BLOCK, forces=0.0):
    """Everything each request answered, with the invariants checked after every step."""
    clock = SimClock()
    scheduler = Scheduler(policy, num_blocks, block, reuse)
    engine = Engine(scheduler, EchoExecutor(num_blocks, block, clock, forces=forces), clock, ahead)
    todo = sorted(requests, key=lambda r: (r.arrival, r.id), reverse=True)
    got: dict[str, dict] = {r.id: {"tokens": [], "scores": 0, "vector": None} for r in todo}
    ends: dict[str, Finish] = {}
    idle = steps = 0
    while todo or engine.busy:
        if not engine.busy:
            clock.advance_to(max(clock.now(), todo[-1].arrival))
        while todo and todo[-1].arrival <= clock.now():
            assert engine.add(todo.pop()) is None
        before = clock.now()
        news = engine.step()
        for out in news:
            got[out.id]["tokens"] += out.tokens
            got[out.id]["scores"] += len(out.scores)
            got[out.id]["vector"] = out.vector or got[out.id]["vector"]
            if out.finish:
                assert out.id not in ends, "a request ended twice"
                ends[out.id] = out.finish
        scheduler.kv.audit(scheduler.live())
        if engine.wait_until is not None:
            clock.advance_to(engine.wait_until)
        idle = 0 if clock.now() > before or any(out.finish for out in news) else idle + 1
        assert idle <= ahead, "the engine idles while there is work"
        steps += 1
        assert steps < 60_000, "livelock"
    pool, tree = scheduler.kv.pool, scheduler.kv.tree
    assert pool.num_free + tree.num_blocks == num_blocks, "blocks have leaked"
    assert set(ends) == set(got), "a request did not end"
    return got, ends, scheduler


def expected_scores(r: Request) -> int:
    return len(r.prompt) - r.score_from if r.score_from >= 1 else 0


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("num_blocks", [26, 60, 400])
@pytest.mark.parametrize("policy", EVERY, ids=lambda p: p.__name__)
def test_output_does_not_depend_on_policy_memory_or_overlap(policy, num_blocks, ahead):
    for seed in range(4):
        requests = workload(seed)
        got, ends, _ = run(requests, policy(), num_blocks, ahead)
        for r in requests:
            assert got[r.id]["tokens"] == reference(r), r.id
            assert got[r.id]["scores"] == expected_scores(r), r.id
            assert (got[r.id]["vector"] is not None) == (r.answer is Answer.VECTOR)
            assert ends[r.id] in (Finish.STOP, Finish.LENGTH)


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("policy", EVERY, ids=lambda p: p.__name__)
def test_tokens_that_must_follow_come_at_once_and_change_no_answer(policy, ahead):
    requests, steps = workload(12), []
    for forces in (0.0, 0.7):
        got, _, scheduler = run(requests, policy(), 60, ahead, forces=forces)
        assert {r.id: got[r.id]["tokens"] for r in requests} == {r.id: reference(r) for r in requests}
        steps.append(scheduler.counters.steps)
    calm = policy.__name__ in ("Policy", "BatchPolicy")
    assert not calm or steps[1] < 0.8 * steps[0]


@pytest.mark.parametrize("policy", EVERY, ids=lambda p: p.__name__)
def test_output_does_not_depend_on_prefix_reuse(policy):
    requests = workload(11)
    shared, _, with_reuse = run(requests, policy(), 60)
    alone, _, without = run(requests, policy(), 60, reuse=False)
    assert shared == alone
    assert without.counters.cached == 0 < with_reuse.counters.cached


def test_refusal_is_an_answer():
    scheduler = Scheduler(Policy(), 4, 4)
    out = scheduler.add(request("big", range(2, 40)), 0.0)
    assert out is not None and out.finish is Finish.REJECT
    assert "38 tokens" in out.error and "16 are available" in out.error and "--memory" in out.error
    assert scheduler.add(request("none", []), 0.0).finish is Finish.REJECT
    assert scheduler.add(request("one", [3]), 0.0) is None
    assert scheduler.add(request("one", [3]), 0.0).finish is Finish.REJECT


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_row_that_outgrows_the_pool_alone_fails_and_the_others_do_not(ahead):
    big = request("big", range(2, 12), Sampling(max_tokens=100))
    small = [request(f"s{i}", [3, 4, 5, i], Sampling(max_tokens=3)) for i in range(6)]
    got, ends, _ = run([big, *small], Policy(), 8, ahead)
    assert ends["big"] is Finish.ERROR
    assert all(ends[r.id] is Finish.LENGTH and got[r.id]["tokens"] == reference(r) for r in small)


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("policy", EVERY, ids=lambda p: p.__name__)
def test_a_run_of_forced_tokens_longer_than_the_pool_fails_its_row_alone(policy, ahead):
    for seed in range(4):
        big = request("big", [2 + seed, 3, 4, 5, 6], Sampling(max_tokens=100))
        small = [request(f"s{i}", [2 + seed, 3, 4, i], Sampling(max_tokens=3)) for i in range(6)]
        got, ends, _ = run([big, *small], policy(), 10, ahead, forces=0.9)
        assert ends["big"] is Finish.ERROR
        assert got["big"]["tokens"] == reference(big)[: len(got["big"]["tokens"])]
        assert all(ends[r.id] is Finish.LENGTH and got[r.id]["tokens"] == reference(r) for r in small)


def test_a_cancelled_row_ends_once_and_frees_its_blocks():
    clock = SimClock()
    scheduler = Scheduler(Policy(), 40, BLOCK)
    engine = Engine(scheduler, EchoExecutor(40, BLOCK, clock), clock, 1)
    for r in (request(f"r{i}", [2, 3, 4, 5, 6, i], Sampling(max_tokens=20)) for i in range(4)):
        engine.add(r)
    engine.step()
    engine.step()
    assert engine.cancel("r1").finish is Finish.CANCEL
    assert engine.cancel("r1") is None and engine.cancel("nobody") is None
    ends = [out.id for _ in range(60) for out in engine.step() if out.finish]
    assert sorted(ends) == ["r0", "r2", "r3"] and not engine.busy
    scheduler.kv.audit([])


def test_a_policy_can_postpone_and_the_plan_says_until_when():
    class Later(Policy):
        def admit(self, seq, reach, view):
            return 2.5

    clock = SimClock()
    engine = Engine(Scheduler(Later(), 40, BLOCK), EchoExecutor(40, BLOCK, clock), clock)
    engine.add(request("r", [2, 3, 4]))
    assert engine.step() == [] and engine.wait_until == 2.5
    clock.advance_to(2.5)
    while engine.busy:
        engine.step()
    assert engine.wait_until is None
