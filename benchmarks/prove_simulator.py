"""Proof: how fast real traces simulate, what a plan of a thousand costs, and Past-Future's table of lengths.

The simulator is the engine: every step is planned and committed by the product's own scheduler. Needs the traces of
../shared. Usage: python -m benchmarks.prove_simulator [PART ...] [--share S] [--laws d1] [--policies a,b]; parts are
azure, mooncake, plan and past-future.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from benchmarks.common import SHARED, write_result
from shoal.core.clock import SimClock
from shoal.core.types import Request, Sampling, Step
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.sched.cost import LinearCost
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor
from shoal.sim.laws import LAWS
from shoal.sim.machine import Machine, cluster_of, machine_of, policy_maker
from shoal.sim.metrics import summary
from shoal.sim.program import spell
from shoal.sim.traces import own
from shoal.sim.workload import Arrivals, find_source, programs

PROVES = ("shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/sim", "shoal/host.py")
TRACES = SHARED / "data" / "traces"
AZURE, MOONCAKE = "azure2023/AzureLLMInferenceTrace_conv.csv.gz", "mooncake/conversation_trace.jsonl.gz"
SPEED = {"azure", "mooncake", "plan"}
PAST_FUTURE = (
    "aggressive", "conservative", "past-future:every=10", "past-future:every=10:condition=0",
    "oracle@past-future:every=10:reserve=0",
)  # fmt: skip
LENGTHS = ("d1", "d2", "d3")


def simulated(name: str, model: str, tensor: int, instances: int, count: int | None) -> dict[str, Any]:
    """Wall seconds of a trace, reading apart, with what came out."""
    machine = machine_of("h100", model, tensor)
    began = time.perf_counter()
    found = programs(find_source(str(TRACES / name)), Arrivals("trace"), count, 0)
    read = time.perf_counter() - began
    cluster = cluster_of(machine, policy_maker("first-come", machine.cost, Budget(2048, 256), None), instances)
    began = time.perf_counter()
    records = cluster.run(found)
    seconds = time.perf_counter() - began
    for instance in cluster.instances:
        instance.engine.scheduler.kv.audit(instance.engine.scheduler.live())
    result = summary(records)
    steps = sum(instance.engine.scheduler.steps for instance in cluster.instances)
    assert result.requests == result.answered + result.refused, result
    return {
        "model": model, "tensor": tensor, "instances": instances, "requests": result.requests,
        "refused": result.refused, "seconds": seconds, "reading_seconds": read, "simulated_seconds": result.seconds,
        "steps": steps, "leapt": sum(instance.leapt for instance in cluster.instances), "prompt": result.prompt,
        "tokens": result.tokens, "cached_share": result.cached / result.prompt, "ttft_p50": result.ttft.p50,
        "ttft_p99": result.ttft.p99, "tbt_p99": result.tbt.p99, "preemptions": result.preemptions,
        "torch_loaded": float("torch" in sys.modules),
    }  # fmt: skip


def plan(running: int = 1000, steps: int = 200) -> dict[str, float]:
    """Milliseconds of planning a step in which so many sequences decode, and of plan and commit together."""
    clock = SimClock()
    scheduler = Scheduler(Policy(Budget(32768, 2 * running)), 64 * running, 32)
    executor = SimExecutor(clock, LinearCost())
    engine = Engine(scheduler, executor, clock)
    for number in range(running):
        engine.add(Request(f"r{number}", spell(((own(number), 500),)), Sampling(max_tokens=1000)))
    while len(scheduler.running) < running or any(seq.pending > 1 for seq in scheduler.running.values()):
        engine.step()
    plans, both = [], []
    for _ in range(steps):
        began = time.perf_counter()
        step = scheduler.plan(clock.now())
        planned = time.perf_counter() - began
        assert isinstance(step, Step) and len(step.slices) == running
        result = executor.submit(step).wait()
        began = time.perf_counter()
        scheduler.commit(step, result, clock.now())
        plans.append(planned)
        both.append(planned + time.perf_counter() - began)
    ranked = sorted(plans)
    return {
        "running": running, "steps": steps, "median_ms": 1e3 * statistics.median(plans),
        "p99_ms": 1e3 * ranked[int(0.99 * steps)], "median_with_commit_ms": 1e3 * statistics.median(both),
    }  # fmt: skip


def past_future(policies: list[str], laws: list[str], share: float) -> dict[str, dict[str, Any]]:
    """Steps, memory in use and evicted requests of Past-Future's three length laws (arXiv 2507.10150): 120,000 tokens
    of memory, 3,000 requests, so many clients that somebody always waits. Prompts take steps too here, and what is
    computed again costs its time."""
    found: dict[str, dict[str, Any]] = {}
    for law in laws:
        for name in policies:
            machine = Machine(LinearCost(), 120_000 // 16, 16)
            cluster = cluster_of(machine, policy_maker(name, machine.cost, Budget(32768, 4096), None))
            requests = programs(LAWS[law], Arrivals("closed", clients=80), int(3000 * share), 0)
            began = time.perf_counter()
            result = summary(cluster.run(requests))
            instance, scheduler = cluster.instances[0], cluster.instances[0].engine.scheduler
            found[f"{law} {name}"] = {
                "requests": result.requests, "steps": scheduler.steps,
                "memory_used": instance.held / instance.looked / machine.blocks,
                "evicted": result.preempted / result.requests, "evictions": result.preemptions,
                "simulated_seconds": result.seconds, "seconds": time.perf_counter() - began,
            }  # fmt: skip
            print(law, name, {key: round(value, 3) for key, value in found[f"{law} {name}"].items()}, flush=True)
    return found


def missing(table: dict[str, dict[str, Any]], laws: list[str]) -> list[str]:
    """What of Past-Future's table does not come out, by law. Policies that were not run are missing too: nothing is
    shown without those to compare with."""
    said = []
    for law in laws:
        found = [table.get(f"{law} {policy}") for policy in PAST_FUTURE]
        if any(each is None for each in found):
            said.append(f"{law}: not all of {', '.join(PAST_FUTURE)} were run")
            continue
        everybody, reserved, drawn, unconditioned, oracle = (each for each in found if each is not None)
        holds = {
            "past-future evicts less than a tenth of what letting everybody in does":
                10 * drawn["evicted"] < everybody["evicted"],
            "past-future uses at least 1.2 times the memory that reserving limits does":
                drawn["memory_used"] >= 1.2 * reserved["memory_used"],
            "true lengths evict none": oracle["evicted"] == 0,
            "lengths that forget what was produced evict more": unconditioned["evicted"] > drawn["evicted"],
        }  # fmt: skip
        said += [f"{law}: {claim}" for claim, held in holds.items() if not held]
    return said


def main() -> int:
    """Measure, print, and say whether the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", choices=["azure", "mooncake", "plan", "past-future", []])
    parser.add_argument("--share", type=float, default=1.0, help="of Past-Future's requests")
    parser.add_argument("--laws", default=",".join(LENGTHS), help="of its three")
    parser.add_argument("--policies", default=",".join(PAST_FUTURE), help="for Past-Future's table")
    wanted = parser.parse_args()
    parts = wanted.parts or ["azure", "mooncake", "plan", "past-future"]
    settle_interpreter()  # as the engine process does
    result: dict[str, Any] = {}
    shown = tabled = True
    for name in parts:
        if name == "azure":
            result[name] = simulated(AZURE, "llama-3-8b", 1, 8, 10_000)
            shown = shown and result[name]["seconds"] < 60 and not result[name]["torch_loaded"]
        elif name == "mooncake":
            result[name] = simulated(MOONCAKE, "llama-3-8b", 1, 8, None)
            shown = shown and result[name]["seconds"] < 120 and result[name]["requests"] == 12_031
        elif name == "plan":
            result[name] = plan()
            shown = shown and result[name]["median_ms"] < 5
        else:
            laws = wanted.laws.split(",")
            table = past_future(wanted.policies.split(","), laws, wanted.share)
            late = missing(table, laws)
            print("\n".join(f"missing: {each}" for each in late) or "the table holds")
            tabled = tabled and not late
            name = "_".join(["past_future_table", *(laws if laws != list(LENGTHS) else ())])
            write_result(name, {"share": wanted.share, "table": table, "missing": late, "shown": not late}, seed=0)
            continue
        print(f"{name}:", {key: round(x, 4) if isinstance(x, float) else x for key, x in result[name].items()})
    if SPEED <= result.keys():
        write_result("simulator", {**result, "shown": shown}, seed=0)
    return 0 if shown and tabled else 1


if __name__ == "__main__":
    sys.exit(main())
