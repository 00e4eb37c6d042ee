"""Proof: what a long prompt does to those who are being answered, for real; and what any policy's plan costs.

The embedded model on this processor: eight answers are under way when a prompt of 2,000 tokens arrives. Whole prompts
first (vLLM's rule at first) against stall-free steps: the longest wait between two tokens of an answer, and whether
all tokens are the same. Then plans of 1,000 running sequences, timed, under every policy that has a name.
Usage: python -m benchmarks.prove_policies
"""

from __future__ import annotations

import inspect
import random
import statistics
import sys
import time
from array import array
from dataclasses import dataclass

from benchmarks.common import write_result
from shoal.build import BuiltEngine, WallClock, build_engine
from shoal.core.clock import SimClock
from shoal.core.config import EngineConfig
from shoal.core.types import TOKEN, Promise, Request, Sampling, Step
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.sched.cost import LinearCost
from shoal.sched.policies import POLICIES, find_policy
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.whole_prompts import PrefillFirst
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

PROVES = ("shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/runtime", "shoal/nn", "shoal/kernels")
LONG, DECODES, BEFORE, AFTER = 2000, 8, 20, 60  # tokens, rows, tokens of each row before and after it arrives
TILE, ROUNDS, BLOCK = 64, 5, 32
RUNNING, WAITING, STEPS = 1000, 200, 150


@dataclass(frozen=True, slots=True)
class Stall:
    """What the rows saw: the longest wait between two tokens [s], and all tokens by row."""

    gap: float
    first: float  # seconds to the long prompt's first token
    tokens: dict[str, list[int]]


def build(threads: int | None = None) -> BuiltEngine:
    """The embedded model with room for the rows and the long prompt."""
    return build_engine(EngineConfig(threads=threads, block_size=BLOCK), useful_tokens=LONG + 64 * 1024)


def prompts(vocabulary: int, long: int) -> list[array[int]]:
    """Of the rows that are under way, then the long one."""
    luck = random.Random(7)
    sizes = [24] * DECODES + [long]
    return [array(TOKEN, [luck.randrange(300, vocabulary) for _ in range(size)]) for size in sizes]


def stall(built: BuiltEngine, policy: Policy, long: int = LONG, answer: int = BEFORE + AFTER) -> Stall:
    """Let the rows produce `BEFORE` tokens, add the long prompt, and watch the clock to the end."""
    clock = WallClock()
    engine = Engine(Scheduler(policy, built.facts.memory.num_blocks, BLOCK), built.runner, clock, ahead=0)
    *short, last = prompts(built.facts.vocab_size, long)
    for row, prompt in enumerate(short):
        assert engine.add(Request(f"d{row}", prompt, Sampling(max_tokens=answer), arrival=clock.now())) is None
    tokens: dict[str, list[int]] = {f"d{row}": [] for row in range(DECODES)} | {"long": []}
    seen: dict[str, float] = {}
    gap, first, came = 0.0, 0.0, None
    while engine.busy:
        if came is None and len(tokens["d0"]) >= BEFORE:
            came = clock.now()
            assert engine.add(Request("long", last, Sampling(max_tokens=8), arrival=came)) is None
        for out in engine.step():
            now = clock.now()
            if out.tokens and out.id == "long" and not tokens["long"] and came is not None:
                first = now - came
            if out.tokens:
                if came is not None and out.id in seen and out.id != "long":
                    gap = max(gap, now - seen[out.id])
                seen[out.id] = now
            tokens[out.id] += out.tokens
    return Stall(gap, first, tokens)


def whole() -> Policy:
    return PrefillFirst(Budget(4096, 64))


def cut() -> Policy:
    return StallFree(Budget(4096, 64), tile=TILE, fixed=TILE)


def compare(built: BuiltEngine, rounds: int, long: int = LONG) -> dict[str, float]:
    """Medians over rounds by turns, after one of each that is thrown away; and whether no token differs."""
    stalls: dict[str, list[Stall]] = {"whole": [], "cut": []}
    for number in range(rounds + 1):
        for name, make in (("whole", whole), ("cut", cut)):
            found = stall(built, make(), long)
            if number:
                stalls[name].append(found)
    everything = [found.tokens for some in stalls.values() for found in some]
    gaps = {name: statistics.median(found.gap for found in some) for name, some in stalls.items()}
    return {
        "whole_gap_ms": 1e3 * gaps["whole"], "cut_gap_ms": 1e3 * gaps["cut"], "ratio": gaps["whole"] / gaps["cut"],
        "least_ratio": min(w.gap / c.gap for w, c in zip(stalls["whole"], stalls["cut"], strict=True)),
        "whole_first_ms": 1e3 * statistics.median(found.first for found in stalls["whole"]),
        "cut_first_ms": 1e3 * statistics.median(found.first for found in stalls["cut"]),
        "same_tokens": float(all(tokens == everything[0] for tokens in everything)),
    }  # fmt: skip


def make(name: str, limit: Budget) -> Policy:
    """The policy with what it takes of a limit, a cost and a promise."""
    cls = find_policy(name)
    given = {"limit": limit, "cost": LinearCost(), "promise": Promise(2.0, 0.2)}
    return cls(**{key: value for key, value in given.items() if key in inspect.signature(cls).parameters})


def pace(name: str, running: int = RUNNING, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of a plan with so many running sequences of all classes, and some that wait for a seat: on the
    clock, and of the processor, which others that compute beside it do not lengthen."""
    luck, clock = random.Random(0), SimClock()
    scheduler = Scheduler(make(name, Budget(65536, running)), 10 * running, BLOCK)
    executor = SimExecutor(clock, LinearCost())
    engine = Engine(scheduler, executor, clock, ahead=1)

    def add(number: int, prompt: int) -> None:
        sampling = Sampling(max_tokens=2 * steps + 60, stop=frozenset({1}))
        wishes = [{"promise": Promise(5.0, 0.5)}, {"deadline": clock.now() + 60.0}, {"index": number}][number % 3]
        tokens = array(TOKEN, [luck.randrange(3, 30_000) for _ in range(prompt)])
        engine.add(Request(f"r{number}", tokens, sampling, arrival=clock.now(), group=f"g{number % 2}", **wishes))

    for number in range(running):
        add(number, 40)
    for _ in range(30):
        engine.step()
    for number in range(running, running + WAITING):
        add(number, 40)
    seconds, processor, slices = [], [], running
    for _ in range(steps):
        began, used = time.perf_counter(), time.thread_time()
        step = scheduler.plan(clock.now())
        seconds.append(time.perf_counter() - began)
        processor.append(time.thread_time() - used)
        assert isinstance(step, Step)
        slices = min(slices, len(step.slices))
        scheduler.commit(step, executor.submit(step).wait(), clock.now())
    ranked = sorted(seconds)
    return {
        "running": len(scheduler.running), "waiting": len(scheduler.waiting), "slices": slices,
        "median_ms": 1e3 * statistics.median(seconds), "p99_ms": 1e3 * ranked[int(0.99 * len(ranked))],
        "median_cpu_ms": 1e3 * statistics.median(processor),
    }  # fmt: skip


def main() -> int:
    """Measure, print, and say whether the claims hold."""
    settle_interpreter()
    plans = {name: pace(name) for name in POLICIES}
    for name, plan in plans.items():
        print(f"{name:18}", {key: round(value, 2) for key, value in plan.items()}, flush=True)
    built = build()
    try:
        found = compare(built, ROUNDS)
    finally:
        built.close()
    print("a long prompt:", {name: round(value, 2) for name, value in found.items()})
    full = [plan for plan in plans.values() if plan["slices"] == RUNNING]
    holds = found["ratio"] >= 4.0 and bool(found["same_tokens"]) and all(plan["median_ms"] < 5.0 for plan in full)
    write_result("policies", {"long_prompt": found, "plans": plans, "shown": holds}, seed=0)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
