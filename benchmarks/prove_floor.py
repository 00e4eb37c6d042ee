"""How near the engine comes to the machine's limits: W1 to W4 at full size with the random 387M-parameter model.

By turns within one process: bf16 and int8 on all cores, bf16 on one core, bf16 beside a busy neighbour. A machine that
others use too does not keep its speed: so the limits are measured just before and just after each run that is held
against them, and runs are compared within a round. It knows what has to hold; it must not know how anything is measured
(`shoal.bench` does).

    python -m benchmarks.prove_floor [--rounds 5] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from statistics import median
from typing import Any

import psutil

from benchmarks.common import write_result
from benchmarks.prove_planning import model
from shoal.bench import machine
from shoal.bench.floor import costs, floor
from shoal.bench.limits import Limits, measure
from shoal.bench.options import WORKLOADS
from shoal.bench.ours import Ours, Run, first_token_seconds
from shoal.bench.workloads import Workload, make
from shoal.core.config import EngineConfig
from shoal.kernels import set_threads
from shoal.nn.arch import ModelConfig, read_config

PROVES = ("shoal/kernels", "shoal/nn", "shoal/runtime", "shoal/sched", "shoal/kv", "shoal/bench", "CMakeLists.txt")
OVER_FLOOR = 1.15
INT8 = {"W2": 1.6, "W3": 1.6}  # times as fast as bf16
TWO_CORES = {"W1": 1.85, "W3": 1.85, "W4": 1.85}  # times as fast as one
FIRST_TOKEN = 3.0  # seconds from nothing
NEIGHBOUR, OVER_SHARE = "W3", 1.15  # slower beside a busy process by its share of the cores, and no more than 15 %


@contextmanager
def busy_neighbour() -> Iterator[psutil.Process]:
    """A process that wants a core all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def beside_neighbour(ours: Ours, workload: Workload) -> dict[str, float]:
    """A run's wall seconds, and the share of all cores that the neighbour got meanwhile."""
    with busy_neighbour() as neighbour:
        before = neighbour.cpu_times()
        run = ours.run(workload)
        after = neighbour.cpu_times()
    got = after.user + after.system - before.user - before.system
    return {"wall": run.span.wall, "share": got / (run.span.wall * len(os.sched_getaffinity(0)))}


def walls(runs: list[Run]) -> float:
    return median(run.span.wall for run in runs)


def times(slow: list[Run], fast: list[Run]) -> float:
    """How many times as long the one takes as the other, round by round."""
    return median(one.span.wall / other.span.wall for one, other in zip(slow, fast, strict=True))


@dataclass
class Rounds:
    """What was measured, by setting and workload."""

    workloads: list[Workload]
    limits: dict[str, list[Limits]] = field(default_factory=lambda: defaultdict(list))  # by workload: of each round
    runs: dict[str, dict[str, list[Run]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    beside: list[dict[str, float]] = field(default_factory=list)
    python: dict[str, float] = field(default_factory=dict)  # share of the wall, by workload


def best(limits: Iterable[Limits]) -> Limits:
    """The highest of each limit: a neighbour can only make a measurement lower."""
    limits = list(limits)
    fastest = max(limits, key=lambda each: each.peak["bf16"])
    return replace(fastest, bandwidth=max(each.bandwidth for each in limits))


def run_rounds(rounds: int, found: Rounds, plain: Ours, quantised: Ours, cores: int) -> None:
    """Every setting once in each round."""
    for number in range(rounds):
        for workload in found.workloads:
            name = workload.name
            before = measure()
            found.runs["bf16"][name].append(plain.run(workload))
            found.limits[name].append(best([before, measure()]))
            found.runs["int8"][name].append(quantised.run(workload))
            if name in TWO_CORES:
                set_threads(1)
                found.runs["one core"][name].append(plain.run(workload))
                set_threads(cores)
            if name == NEIGHBOUR:
                found.beside.append(beside_neighbour(plain, workload))
        seen = ", ".join(f"{name} {walls(runs):.2f} s" for name, runs in found.runs["bf16"].items())
        print(f"round {number + 1}: {seen}", flush=True)
    for workload in found.workloads:
        run, watch = plain.watch(workload, parts=False)
        found.python[workload.name] = watch.parts(run.span.wall)["python"] / run.span.wall


def summary(found: Rounds, described: ModelConfig) -> dict[str, dict[str, Any]]:
    """Medians and ratios by workload."""
    rows: dict[str, dict[str, Any]] = {}
    for workload in found.workloads:
        name, needs = workload.name, costs(described, "bf16")
        runs = found.runs["bf16"][name]
        floors = [floor(workload, needs, limits).seconds for limits in found.limits[name]]
        over = [run.span.wall / least for run, least in zip(runs, floors, strict=True)]
        least = floor(workload, needs, best(chain(*found.limits.values())))
        alone = found.runs["one core"][name]
        rows[name] = {
            "wall": walls(runs), "cpu": median(run.span.cpu for run in runs), "floor": median(floors),
            "over_floor": median(over), "over_floor_by_round": over, "over_best_floor": walls(runs) / least.seconds,
            "int8_speedup": times(runs, found.runs["int8"][name]),
            "cores_speedup": times(alone, runs) if alone else None, "python": found.python[name],
            "others": median(run.span.others or 0.0 for run in runs), "best_floor_parts": asdict(least),
        }  # fmt: skip
    for each, run in zip(found.beside, found.runs["bf16"][NEIGHBOUR], strict=True):
        each["over_share"] = each["wall"] / run.span.wall * (1 - each["share"])
    return rows


def measured(rounds: int, scale: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """The numbers, and what holds."""
    cores = len(os.sched_getaffinity(0))
    config = EngineConfig(model=str(model()), weights="bf16", threads=cores)
    described = read_config(model())
    found = Rounds([make(name, described.vocab_size, scale) for name in WORKLOADS])
    machine.forget_peak()  # the buffer of the bandwidth is not the engine's
    first = [first_token_seconds(config, found.workloads[0].prompt_tokens) for _ in range(3)]
    plain = Ours(config, found.workloads)
    run_rounds(rounds, found, plain, Ours(replace(config, weights="int8"), found.workloads), cores)
    rows = summary(found, described)
    holds = {
        f"over the floor at most {OVER_FLOOR}": all(row["over_floor"] <= OVER_FLOOR for row in rows.values()),
        "int8 against bf16": all(rows[name]["int8_speedup"] >= least for name, least in INT8.items()),
        "two cores against one": all(rows[name]["cores_speedup"] >= least for name, least in TWO_CORES.items()),
        "start to first token": median(first) < FIRST_TOKEN,
        "busy neighbour": median(each["over_share"] for each in found.beside) <= OVER_SHARE,
        "Python's share of a step below 2 %": all(row["python"] < 0.02 for row in rows.values()),
    }
    runs = {way: {name: [asdict(run) for run in each] for name, each in by.items()} for way, by in found.runs.items()}
    numbers = {
        "rounds": rounds, "scale": scale, "workloads": rows,
        "limits": {name: [asdict(each) for each in limits] for name, limits in found.limits.items()},
        "start_to_first_token": first, "beside_a_neighbour": found.beside, "runs": runs,
    }  # fmt: skip
    return numbers, holds


def main() -> int:
    """Print what holds; 1 when something does not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    asked = parser.parse_args()
    numbers, holds = measured(asked.rounds, asked.scale)
    for name, row in numbers["workloads"].items():
        cores = f"{row['cores_speedup']:.2f}" if row["cores_speedup"] else "not run"
        print(
            f"{name}: {row['wall']:.2f} s, {row['cpu']:.1f} s of processor, floor {row['floor']:.2f} s, "
            f"{row['over_floor']:.3f} x ({row['over_best_floor']:.3f} x that of the best limits of all rounds); "
            f"int8 {row['int8_speedup']:.2f} x; two cores {cores}; Python {100 * row['python']:.1f} %"
        )
    print(f"first token after {median(numbers['start_to_first_token']):.2f} s; beside {numbers['beside_a_neighbour']}")
    for name, held in holds.items():
        print(f"{name}: {'holds' if held else 'DOES NOT HOLD'}")
    if asked.scale == 1.0:
        write_result("floor", numbers | {"holds": holds, "shown": all(holds.values())})
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
