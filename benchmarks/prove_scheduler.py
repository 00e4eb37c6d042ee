"""Proof: what a plan and a commit cost beside a big batch, and that a 10,000-request job simulates in seconds.

256 running sequences of 1,000 tokens and more under BatchPolicy with its forecast, 1,024 rows refused in the window
and 100,000 in the job; 1,000 decode steps timed one by one. Usage: python -m benchmarks.prove_scheduler
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from array import array
from collections.abc import Iterator

from benchmarks.common import write_result
from shoal.core.clock import SimClock
from shoal.core.types import TOKEN, Request, Sampling, Step
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.sched.cost import LinearCost
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

PROVES = ("shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/sim", "shoal/host.py")
BLOCK, SHARED, OWN, OUTPUT = 32, 512, 488, 1300
RUNNING, WINDOW, ROWS, STEPS = 256, 1024, 100_000, 1000


def rows(count: int, luck: random.Random) -> Iterator[Request]:
    """Rows of 1,000 tokens, half of them shared by all; nothing but the limit ends an answer."""
    head = [luck.randrange(300, 30000) for _ in range(SHARED)]
    sampling = Sampling(max_tokens=OUTPUT)
    for i in range(count):
        prompt = array(TOKEN, head + [luck.randrange(300, 30000) for _ in range(OWN)])
        future = ((SHARED, i + 1),) if i + 1 < count else ()
        yield Request(f"r{i}", prompt, sampling, index=i, future=future)


def plan_and_commit() -> dict[str, float]:
    """Milliseconds of plan + commit over the decode steps: median, 99th percentile, worst; processor time apart."""
    each = -(-(OWN + OUTPUT + 1) // BLOCK) + 1
    blocks = SHARED // BLOCK + RUNNING * each
    scheduler = Scheduler(BatchPolicy(Budget(2048, 512)), blocks, BLOCK)
    clock = SimClock()
    executor = SimExecutor(clock, LinearCost())
    engine = Engine(scheduler, executor, clock, ahead=1)
    feed = rows(ROWS, random.Random(0))
    while len(scheduler.running) < RUNNING or any(seq.pending > 1 for seq in scheduler.running.values()):
        while len(scheduler.waiting) < WINDOW:
            engine.add(next(feed))
        engine.step()
    while len(scheduler.waiting) < WINDOW:
        engine.add(next(feed))
    started = max(seq.request.index for seq in scheduler.running.values())
    walls, cpus = [], []
    for _ in range(STEPS):
        wall, cpu = time.perf_counter(), time.thread_time()
        step = scheduler.plan(clock.now())
        planned_wall, planned_cpu = time.perf_counter() - wall, time.thread_time() - cpu
        assert isinstance(step, Step) and len(step.slices) >= RUNNING
        result = executor.submit(step).wait()
        wall, cpu = time.perf_counter(), time.thread_time()
        scheduler.commit(step, result, clock.now())
        walls.append(planned_wall + time.perf_counter() - wall)
        cpus.append(planned_cpu + time.thread_time() - cpu)
    assert max(seq.request.index for seq in scheduler.running.values()) == started, "the window was not refused"
    scheduler.kv.audit(scheduler.live())
    ranked, ranked_cpu = sorted(walls), sorted(cpus)
    return {
        "running": len(scheduler.running), "waiting": len(scheduler.waiting), "steps": STEPS,
        "median_ms": 1e3 * statistics.median(walls), "p99_ms": 1e3 * ranked[int(0.99 * STEPS)],
        "worst_ms": 1e3 * ranked[-1], "median_cpu_ms": 1e3 * statistics.median(cpus),
        "p99_cpu_ms": 1e3 * ranked_cpu[int(0.99 * STEPS)],
    }  # fmt: skip


def simulate() -> dict[str, float]:
    """A job of 10,000 requests with learnt lengths, on a modelled machine."""
    luck = random.Random(1)
    head = [luck.randrange(300, 30000) for _ in range(600)]
    lengths = {f"r{i}": min(400, 1 + int(luck.expovariate(1 / 60))) for i in range(10_000)}
    clock = SimClock()
    scheduler = Scheduler(BatchPolicy(Budget(2048, 512)), 6000, BLOCK)
    engine = Engine(scheduler, SimExecutor(clock, LinearCost(), lengths), clock, ahead=1)
    began, added, ended = time.perf_counter(), 0, 0
    while added < 10_000 or engine.busy:
        while added < 10_000 and len(scheduler.waiting) < 256:
            prompt = array(TOKEN, head + [luck.randrange(300, 30000) for _ in range(40)])
            future = ((600, added + 1),) if added < 9_999 else ()
            sampling = Sampling(max_tokens=400, stop=frozenset({1}))
            engine.add(Request(f"r{added}", prompt, sampling, index=added, future=future))
            added += 1
        ended += sum(out.finish is not None for out in engine.step())
    seconds = time.perf_counter() - began
    counters = scheduler.counters
    assert ended == 10_000
    return {
        "seconds": seconds, "simulated_seconds": clock.now(), "steps": counters.steps,
        "preemptions": counters.preemptions, "prompt_computed": counters.prompt_computed,
        "bound": 600 + 40 * 10_000, "torch_loaded": float("torch" in sys.modules),
    }  # fmt: skip


def main() -> int:
    """Measure, print, and say whether the claims hold."""
    settle_interpreter()  # as the engine process does
    cost, job = plan_and_commit(), simulate()
    print("plan and commit:", {name: round(value, 2) for name, value in cost.items()})
    print("simulated job:", {name: round(value, 1) for name, value in job.items()})
    holds = cost["median_ms"] < 3 and cost["p99_ms"] < 5 and job["seconds"] < 60 and not job["torch_loaded"]
    write_result("scheduler", {"plan_and_commit": cost, "simulated_job": job, "shown": holds}, seed=0)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
