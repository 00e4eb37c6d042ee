"""Requests that arrive over time, served by the engine in pretend time, with every step looked at. A test fixture."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal.core.clock import SimClock
from shoal.core.types import Finish, Output, Promise, Request, Sampling, Step
from shoal.engine import Engine
from shoal.sched.cost import Cost, LinearCost
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

END = frozenset({1})
COST = LinearCost((4e-3, 2e-5, 5e-8, 1e-10))


@dataclass
class Served:
    """What happened to each request, by id, and all steps."""

    scheduler: Scheduler
    clock: SimClock
    asked: dict[str, Request] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)  # of its tokens
    ends: dict[str, Output] = field(default_factory=dict)
    steps: list[tuple[float, Step]] = field(default_factory=list)  # with the time it was planned
    peak: int = 0  # blocks in use at most
    used: float = 0.0  # mean of blocks in use over steps
    most: int = 0  # sequences running at most

    def gaps(self, id: str) -> list[float]:
        times = self.times[id]
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    def first(self, id: str) -> float:
        return self.times[id][0] - self.asked[id].arrival

    def start(self, id: str) -> float:
        return self.ends[id].timing["start"]

    def kept(self, id: str) -> bool:
        """Whether all that was promised to the request was kept."""
        request, times = self.asked[id], self.times[id]
        promise = request.promise or Promise()
        gaps = all(gap <= promise.gap * 1.001 for gap in self.gaps(id))
        return gaps and self.first(id) <= promise.first and times[-1] <= request.deadline


def ask(id: str, prompt: int | list[int], limit: int = 64, luck: random.Random | None = None, **more) -> Request:
    """A request whose prompt is given, or as many random tokens of its own."""
    luck = luck or random.Random(id)
    tokens = [luck.randrange(3, 30_000) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(id, array("i", tokens), Sampling(max_tokens=limit, stop=END), **more)


def watched(policy: Policy) -> list[Budget]:
    """A list that always ends with the policy's last answer to how big a step may be."""
    budgets: list[Budget] = []
    answer = policy.budget

    def budget(view):
        budgets.append(answer(view))
        return budgets[-1]

    policy.budget = budget
    return budgets


def serve(
    policy: Policy, requests: list[Request], lengths: Mapping[str, int], blocks: int = 400, block: int = 16,
    cost: Cost = COST, ahead: int = 0, audit: bool = False,
    after: Callable[[Output, Engine], list[Request]] | None = None, reuse: bool = True,
) -> Served:  # fmt: skip
    """Run to the end. `after` says what a finished request brings about: requests to come."""
    clock = SimClock()
    scheduler = Scheduler(policy, blocks, block, reuse)
    engine = Engine(scheduler, SimExecutor(clock, cost, lengths), clock, ahead)
    served, budgets = Served(scheduler, clock), watched(policy)
    todo = sorted(requests, key=lambda r: (r.arrival, r.id), reverse=True)
    idle = count = 0
    while todo or engine.busy:
        if not engine.busy:
            clock.advance_to(max(clock.now(), todo[-1].arrival))
        while todo and todo[-1].arrival <= clock.now():
            request = todo.pop()
            served.asked[request.id], served.times[request.id] = request, []
            refused = engine.add(request)
            if refused is not None:
                served.ends[request.id] = refused
        before, last = clock.now(), engine.last
        news = engine.step()
        step = engine.last
        if step is not None and step is not last:
            served.steps.append((before, step))
            budget = budgets[-1]
            assert step.num_tokens <= max(budget.tokens, 1) and len(step.slices) <= max(budget.sequences, 1)
        for out in news:
            served.times[out.id] += [clock.now()] * len(out.tokens)
            if out.finish is not None:
                assert out.id not in served.ends, "a request ended twice"
                served.ends[out.id] = out
                if after is not None:
                    todo += after(out, engine)
                    todo.sort(key=lambda r: (r.arrival, r.id), reverse=True)
        served.peak = max(served.peak, scheduler.kv.in_use)
        served.used += scheduler.kv.in_use
        served.most = max(served.most, len(scheduler.running))
        count += 1
        if audit:
            scheduler.kv.audit(scheduler.live())
        if engine.wait_until is not None:
            clock.advance_to(engine.wait_until)
        idle = 0 if clock.now() > before or news else idle + 1
        assert idle <= ahead + 1, "the engine idles while there is work"
    served.used /= max(count, 1)
    scheduler.kv.audit([])
    assert scheduler.kv.pool.num_free + scheduler.kv.tree.num_blocks == blocks, "blocks have leaked"
    assert set(served.ends) == set(served.asked), "a request did not end"
    return served


def whole(served: Served, lengths: Mapping[str, int]) -> None:
    """Every answer is as long as the executor, which alone knew, had it."""
    for id, request in served.asked.items():
        if served.ends[id].finish is Finish.REJECT:
            continue
        assert len(served.times[id]) == min(lengths[id], request.sampling.max_tokens), id


def mixture(seed: int, count: int = 30, limit: int = 60, rate: float = 40.0) -> tuple[list[Request], dict[str, int]]:
    """Promises, deadlines, programs and batch rows over each other, some prompts alike at the head, with lengths."""
    luck = random.Random(seed)
    heads = [[luck.randrange(3, 50) for _ in range(luck.randrange(1, 60))] for _ in range(3)]
    requests, lengths, now = [], {}, 0.0
    for i in range(count):
        now += luck.expovariate(rate)
        prompt = [*luck.choice(heads), *(luck.randrange(3, 50) for _ in range(luck.choice([1, 5, 20, 200])))]
        more: dict = {"arrival": now, "group": luck.choice(["a", "b"])}
        kind = luck.randrange(5)
        if kind == 0:
            more["promise"] = Promise(luck.choice([0.05, 1.0]), luck.choice([0.01, 0.1]))
        elif kind in (1, 2):
            more["deadline"] = now + luck.choice([0.1, 2.0])
            more["program"] = luck.choice(["", "p", "q"]) if kind == 2 else ""
        elif kind == 3:
            more |= {"index": i, "future": ()}
        id = f"r{i:03}"
        requests.append(ask(id, prompt, luck.randrange(1, limit), **more))
        lengths[id] = luck.randrange(1, limit)
    return requests, lengths
