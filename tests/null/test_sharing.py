"""Prefix sharing: each distinct prompt token is computed once, whatever the block size, the budget or the order."""

from __future__ import annotations

import random
from array import array

import pytest

from shoal.core.clock import SimClock
from shoal.core.types import Request, Sampling
from shoal.engine import Engine
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor, reference


class LeastRecentlyUsed(BatchPolicy):
    """The control: the same batching, without knowing the future."""

    def worth(self, node):
        return node.last_use


def hierarchy(seed: int, count: int, vocabulary: int = 30) -> list[list[int]]:
    """Prompts that branch at any depth, inside blocks too; some are equal, some are prefixes of others."""
    luck = random.Random(seed)
    pool: list[list[int]] = [[luck.randrange(2, vocabulary) for _ in range(luck.randrange(1, 120))]]
    for _ in range(count):
        base = luck.choice(pool)
        cut = luck.choice([len(base), luck.randrange(1, len(base) + 1)])
        pool.append(base[:cut] + [luck.randrange(2, vocabulary) for _ in range(luck.choice([0, 1, 3, 40]))])
    return pool


def common(a, b) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def bound(prompts) -> int:
    """Size of the trie of all prompts."""
    ordered = sorted(prompts)
    return sum(map(len, ordered)) - sum(common(a, b) for a, b in zip(ordered, ordered[1:], strict=False))


def future(prompts, i) -> tuple[tuple[int, int], ...]:
    """For each depth of prompt i the next later prompt that shares it, naively."""
    steps: list[tuple[int, int]] = []
    deepest = 0
    for j in range(i + 1, len(prompts)):
        depth = common(prompts[i], prompts[j])
        if depth > deepest:
            steps.append((depth, j))
            deepest = depth
    return tuple(reversed(steps))


def requests(prompts, luck, known: bool = True, most: int = 9) -> list[Request]:
    return [
        Request(
            f"r{i}",
            array("i", prompt),
            Sampling(max_tokens=luck.randrange(1, most)),
            index=i,
            future=future(prompts, i) if known else None,
        )
        for i, prompt in enumerate(prompts)
    ]


def run(work, policy, num_blocks, block, ahead=0, window=20):
    """Answers and scheduler, feeding at most `window` waiting requests at a time, as a job does."""
    clock = SimClock()
    scheduler = Scheduler(policy, num_blocks, block)
    engine = Engine(scheduler, EchoExecutor(num_blocks, block, clock), clock, ahead)
    todo, got = list(reversed(work)), {r.id: [] for r in work}
    while todo or engine.busy:
        while todo and len(scheduler.waiting) < window:
            assert engine.add(todo.pop()) is None
        for out in engine.step():
            got[out.id] += out.tokens
    scheduler.plan(clock.now())
    scheduler.kv.audit([])
    assert got == {r.id: reference(r) for r in work}
    return scheduler


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
@pytest.mark.parametrize("budget", [64, 256, 2048])
@pytest.mark.parametrize("block", [16, 32])
def test_planned_order_computes_the_trie_and_nothing_more(block, budget, ahead):
    for seed in range(4):
        prompts = sorted(hierarchy(seed, 80))
        work = requests(prompts, random.Random(seed))
        scheduler = run(work, BatchPolicy(Budget(budget, 64)), 2000, block, ahead)
        counters = scheduler.counters
        assert counters.prompt_computed - counters.prompt_last == bound(prompts)
        assert counters.preemptions == 0
        assert scheduler.kv.tree.num_blocks == 0, "a block outlived its last use"


@pytest.mark.parametrize("block", [4, 16])
def test_any_order_computes_the_trie_when_memory_is_ample(block):
    for seed in range(4):
        prompts = hierarchy(seed, 80)
        for known in (True, False):
            counters = run(requests(prompts, random.Random(seed), known), Policy(Budget(100, 30)), 4000, block).counters
            computed = counters.prompt_computed - counters.prompt_last
            # Where nobody knows the future, answers are kept too, and a prompt may go on where one ended.
            assert computed == bound(prompts) if known else bound(prompts) - 9 < computed <= bound(prompts)


@pytest.mark.parametrize("ahead", [0, 1], ids=["plain", "overlap"])
def test_planned_order_recomputes_nothing_when_memory_is_short_of_the_prefixes(ahead):
    for seed in range(6):
        luck = random.Random(seed)
        heads = [[luck.randrange(2, 30) for _ in range(luck.randrange(60, 130))] for _ in range(12)]
        prompts = sorted(
            h + [luck.randrange(2, 30) for _ in range(luck.randrange(5, 20))] for h in heads for _ in range(10)
        )
        block = 8
        tokens = 0.3 * sum(map(len, heads)) + 12 * (20 + 9)
        scheduler = run(
            requests(prompts, luck), BatchPolicy(Budget(128, 64), reserve=0.0), int(tokens / block), block, ahead
        )
        counters = scheduler.counters
        assert counters.prompt_computed - counters.prompt_last == bound(prompts)
        assert counters.preemptions == 0


def test_in_file_order_known_future_recomputes_less_than_recency():
    ratios = []
    for seed in range(4):
        luck = random.Random(seed)
        heads = [[luck.randrange(2, 900) for _ in range(96)] for _ in range(10)]
        prompts = [h + [luck.randrange(2, 900) for _ in range(6)] for h in heads for _ in range(12)]
        luck.shuffle(prompts)
        blocks = int((0.3 * 960 + 12 * 14) / 8)
        again = []
        for policy in (BatchPolicy, LeastRecentlyUsed):
            counters = run(requests(prompts, luck), policy(Budget(256, 64)), blocks, 8).counters
            again.append(counters.prompt_computed - counters.prompt_last - bound(prompts))
        ratios.append(again[0] / again[1])
    assert max(ratios) < 0.9, ratios


def test_a_follower_goes_on_when_its_leader_is_cancelled_half_way():
    head = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    work = [Request(f"r{i}", array("i", [*head, 20 + i]), Sampling(max_tokens=3)) for i in range(3)]
    clock = SimClock()
    scheduler = Scheduler(Policy(Budget(5, 4)), 40, 4)
    engine = Engine(scheduler, EchoExecutor(40, 4, clock), clock)
    for request in work:
        engine.add(request)
    engine.step()
    assert len(scheduler.running) == 1 and len(scheduler.waiting) == 2
    engine.cancel("r0")
    got: dict[str, list[int]] = {"r1": [], "r2": []}
    while engine.busy:
        for out in engine.step():
            got[out.id] += out.tokens
        scheduler.kv.audit(scheduler.live())
    assert got == {r.id: reference(r) for r in work[1:]}


def test_rows_with_different_salts_share_nothing():
    prompt = array("i", range(2, 40))
    work = [Request(f"r{i}", prompt, Sampling(max_tokens=2), salt=str(i)) for i in range(4)]
    counters = run(work, Policy(), 200, 8).counters
    assert counters.prompt_computed == 4 * len(prompt) and counters.cached == 0


@pytest.mark.parametrize("length", [16, 17, 54])
@pytest.mark.parametrize("sampling", [Sampling(max_tokens=0), Sampling(max_tokens=3)], ids=["nothing", "three"])
def test_an_equal_prompt_computes_its_last_token_again_and_no_more(length, sampling):
    work = [Request(f"r{i}", array("i", range(2, 2 + length)), sampling, index=i, future=()) for i in range(2)]
    work[0] = Request("r0", work[0].prompt, sampling, index=0, future=((length, 1),))
    counters = run(work, BatchPolicy(), 40, 16).counters
    assert (counters.prompt_computed, counters.prompt_last) == (work[0].goal + 1, 1)


def test_a_scored_row_reuses_nothing_and_says_nothing_of_a_last_token():
    prompt = array("i", range(2, 11))
    work = [Request(f"r{i}", prompt, Sampling(max_tokens=3), index=i, future=(), score_from=1) for i in range(2)]
    counters = run(work, BatchPolicy(), 40, 16).counters
    assert (counters.prompt_computed, counters.prompt_last) == (18, 0)
