"""Proof: what a long prompt does to those who are being answered, for real; and what any policy's plan costs.

The embedded model on this processor: eight answers are under way when a prompt of 2,000 tokens arrives. Whole prompts
first (vLLM's rule at first) against stall-free steps: the longest wait between two tokens of an answer, and whether
all tokens are the same. Then plans of 1,000 running sequences, timed, under every policy that has a name.
Usage: python -m benchmarks.prove_policies [plans]: with `plans`, those alone, and nothing is written.
"""

from __future__ import annotations

import inspect
import math
import random
import statistics
import sys
import time
from array import array
from dataclasses import dataclass
from itertools import count

from benchmarks.common import write_result
from shoal.build import BuiltEngine, WallClock, build_engine
from shoal.core.clock import SimClock
from shoal.core.config import EngineConfig
from shoal.core.types import TOKEN, Promise, Request, Sampling, Step
from shoal.engine import Engine, Pending
from shoal.host import settle_interpreter
from shoal.sched.cost import LinearCost
from shoal.sched.policies import POLICIES, find_policy
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.time_to_live import TimeToLive
from shoal.sched.policies.whole_prompts import PrefillFirst
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

PROVES = ("shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/runtime", "shoal/nn", "shoal/kernels")
LONG, DECODES, BEFORE, AFTER = 2000, 8, 20, 60  # tokens, rows, tokens of each row before and after it arrives
TILE, ROUNDS, BLOCK = 64, 5, 32
RUNNING, WAITING, PROGRAMS, PROMPT = 1000, 200, 200, 40  # sequences, of programs those that wait for tools, and tokens
STEPS = 150  # plans that are timed
PLAN = 5.0  # ms of the processor, claimed of the median plan and of nine in ten


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
    """The policy with what it takes of a limit, a cost and a promise; times to live outlast what is timed."""
    cls = find_policy(name)
    given = {"limit": limit, "cost": LinearCost(), "promise": Promise(2.0, 0.2), "always": math.inf}
    return cls(**{key: value for key, value in given.items() if key in inspect.signature(cls).parameters})


def crowd(name: str, running: int, steps: int) -> Engine:
    """An engine in pretend time with memory for all of so many sequences to their last token, so many that run, of all
    classes of promises, and some that wait for a seat. Of programs, a turn has ended and a tool is called: their memory
    is pinned where the policy pins; some of those that wait are their next turns."""
    luck, clock = random.Random(0), SimClock()
    firsts = count(3)  # tokens: none begins as another does, or it would wait for that
    warm = 2 * running  # plans at most until all run: some policies let in one prompt a step
    answer = 2 * (warm + steps)
    blocks = (running + WAITING + PROGRAMS) * (-(-(PROMPT + answer) // BLOCK) + 2)
    scheduler = Scheduler(make(name, Budget(65536, running)), blocks, BLOCK)
    engine = Engine(scheduler, SimExecutor(clock, LinearCost()), clock, ahead=1)

    def add(name: str, number: int, answer: int, program: str) -> None:
        sampling = Sampling(max_tokens=answer, stop=frozenset({1}))
        wishes = [{"promise": Promise(5.0, 0.5)}, {"deadline": clock.now() + 60.0}, {"index": number}][number % 3]
        tokens = array(TOKEN, [next(firsts), *(luck.randrange(3, 30_000) for _ in range(PROMPT - 1))])
        group = f"g{number % 2}"
        request = Request(name, tokens, sampling, arrival=clock.now(), group=group, program=program, **wishes)
        assert engine.add(request) is None, request.id

    for number in range(PROGRAMS):
        add(f"turn{number}", number, 2, f"p{number}")
    while engine.busy:
        engine.step()
    for number in range(PROGRAMS):
        engine.tell(f"p{number}", "search")
    for number in range(running):
        add(f"r{number}", number, answer, "")
    for _ in range(warm):
        engine.step()
        if not any(seq.pending > 1 for seq in scheduler.running.values()) and len(scheduler.running) == running:
            break
    while scheduler.in_flight:
        engine.finish()
    for number in range(WAITING):
        add(f"w{number}", number, answer, f"p{number}" if number < PROGRAMS // 2 else "")
    return engine


def pace(name: str, running: int = RUNNING, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of a plan with so many running sequences while a step is in flight: of the processor, which others
    that compute beside it do not lengthen, and on the clock."""
    engine = crowd(name, running, steps)
    scheduler, clock = engine.scheduler, engine.clock
    seconds, processor, slices, least = [], [], running, running
    flying: tuple[Step, Pending] | None = None
    for _ in range(steps):
        began, used = time.perf_counter(), time.thread_time()
        step = scheduler.plan(clock.now())
        seconds.append(time.perf_counter() - began)
        processor.append(time.thread_time() - used)
        assert isinstance(step, Step)
        slices, least = min(slices, len(step.slices)), min(least, len(scheduler.running))
        pending = engine.executor.submit(step)
        if flying is not None:
            scheduler.commit(flying[0], flying[1].wait(), clock.now())
        flying = step, pending
    found = {"running": least, "waiting": len(scheduler.waiting), "slices": slices}
    if isinstance(scheduler.policy, TimeToLive):
        found["pins"] = len(scheduler.policy._pins)
    for key, some in (("cpu", processor), ("wall", seconds)):
        tenths = statistics.quantiles(some, n=10)
        found |= {f"median_{key}_ms": 1e3 * statistics.median(some), f"p90_{key}_ms": 1e3 * tenths[-1]}
    return found


def missing(plans: dict[str, dict[str, float]], running: int = RUNNING) -> list[str]:
    """Policies for which what is claimed is not shown: that all sequences ran, with pins where there are such, and that
    the median and the ninth of ten plans took less than PLAN of the processor. The clock's times are for looking at."""
    said = []
    for name in POLICIES:
        plan = plans.get(name)
        if plan is None:
            said.append(f"{name}: not measured")
        elif plan["running"] != running:
            said.append(f"{name}: {plan['running']:.0f} ran, not {running}")
        elif plan.get("pins", 1) == 0:
            said.append(f"{name}: nothing was pinned")
        elif plan["median_cpu_ms"] >= PLAN or plan["p90_cpu_ms"] >= PLAN:
            said.append(
                f"{name}: median {plan['median_cpu_ms']:.1f} ms, p90 {plan['p90_cpu_ms']:.1f} ms of the processor"
            )
    return said


def paces() -> dict[str, dict[str, float]]:
    """Of every policy that has a name."""
    plans = {}
    for name in POLICIES:
        plans[name] = pace(name)
        print(f"{name:18}", {key: round(value, 2) for key, value in plans[name].items()}, flush=True)
    return plans


def main() -> int:
    """Measure, print, and say whether the claims hold."""
    settle_interpreter()
    plans = paces()
    if sys.argv[1:] == ["plans"]:
        print("missing:", missing(plans) or "none")
        return 1 if missing(plans) else 0
    built = build()
    try:
        found = compare(built, ROUNDS)
    finally:
        built.close()
    print("a long prompt:", {name: round(value, 2) for name, value in found.items()})
    late = missing(plans)
    for said in late:
        print("missing:", said)
    holds = found["ratio"] >= 4.0 and bool(found["same_tokens"]) and not late
    write_result("policies", {"long_prompt": found, "plans": plans, "missing": late, "shown": holds}, seed=0)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
