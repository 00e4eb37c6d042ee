"""Proof: predicted times against measured ones, of profiles of GPUs and of real runs on this CPU.

`profiles`: a few parameters are fitted to a part of each measured profile and judged on the rest; what is in
`shoal/sim/hardware.py` is judged beside them wherever `shoal sim` prices steps by it, and the makers' promises alone
are a control. A model's name: a cost is learnt from one real run with requests that arrive at random, and predicts
other arrivals, at random and all at once, which are then run five times for real; twice that cost is a control that
must fail. And a scheduler that is told what such a run was told makes the same plans.

    python -m benchmarks.prove_calibration [profiles] [minnow] [llama130m]
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RESULTS, write_result
from benchmarks.gpu_profiles import FOLDER, Profile, profiles
from shoal.core.types import Step
from shoal.sched.cost import Cost
from shoal.sim.fit import Timed, fit_cost, fit_linear, search
from shoal.sim.hardware import CPU, Hardware
from shoal.sim.roofline import Load, Roofline
from shoal.sim.shapes import SHAPES

if TYPE_CHECKING:
    from benchmarks.live import Times

    Pair = tuple[Times, Times]

PROVES = (
    "shoal/sim", "shoal/sched", "shoal/engine.py", "shoal/kv", "shoal/core", "shoal/runtime", "shoal/kernels",
    "benchmarks/gpu_profiles.py", "benchmarks/live.py",
)  # fmt: skip
LIMIT = 0.15  # median error of a profile's held-out points
MODELS = ("minnow", "llama130m")
SECONDS, LOAD, REPEATS = 9.0, 0.5, 5  # of a run; of what the machine can do; real runs of what was predicted
ON_CPU = {"compute": 0.7, "memory": 0.7, "attention": 0.3, "reading": 0.5, "kernel": 1e-5, "step": 5e-4, "row": 1e-5}
AT_ONCE = 3.0  # s of requests that come all together: at half load the makespan is the arrivals', whatever a step takes
LIMITS = {"makespan": 0.10, "makespan at once": 0.10, "first p50": 0.10, "first p99": 0.20}
SHARES = ("compute", "memory", "hidden", "light", "attention", "reading", "share", "soon_share", "usable")


def errors(profile: Profile, machine: Hardware) -> np.ndarray:
    """Absolute relative errors of the held-out points."""
    keys = [key for key in profile.points if profile.judged(key)]
    return np.array([abs(profile.price(machine, key) / profile.points[key] - 1.0) for key in keys])


def judged(profile: Profile) -> dict[str, Any]:
    """Fit, and say how far off the rest is."""
    points = profile.fit_points()

    def loss(found: Mapping[str, float]) -> float:
        machine = profile.change(profile.shipped, found)
        return float(np.mean([min(1.0, abs(profile.price(machine, k) / profile.points[k] - 1.0)) for k in points]))

    found = search(loss, profile.start, dict.fromkeys(SHARES, 1.0)) if profile.start else {}
    fitted = profile.change(profile.shipped, found) if found else profile.shipped
    machines = {"fitted": fitted, "shipped": profile.shipped, "promised": profile.shipped.bare()}
    result: dict[str, Any] = {"name": profile.name, "held": profile.held, "note": profile.note, "found": found}
    for name, machine in machines.items():
        off = errors(profile, machine)
        result[name] = {"median": float(np.median(off)), "p90": float(np.quantile(off, 0.9))}
    for part in profile.parts:
        keys = [key for key in profile.points if key[-1] == part]
        off = [abs(profile.price(profile.shipped, key) / profile.points[key] - 1.0) for key in keys]
        result["shipped"][part] = float(np.median(off))
    judges = ("fitted", "shipped") if profile.used else ("fitted",)
    result["used"] = profile.used
    result["missing"] = [name for name in judges if result[name]["median"] > LIMIT]
    result["fit_points"], result["held_points"] = len(points), sum(profile.judged(key) for key in profile.points)
    return result


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{result[name]['median']:6.1%} {result[name]['p90']:7.1%}" for name in ("fitted", "shipped", "promised")]
    return f"{result['name']:58s} {result['fit_points']:4d} {result['held_points']:5d}  {'   '.join(cells)}" + (
        "" if result["used"] else "  (shipped: not used)"
    ) + ("".join(f"  MISSING: {name}" for name in result["missing"]))  # fmt: skip


def gpu() -> dict[str, Any]:
    """The table of profiles."""
    print(f"{'profile':58s}  fit  held  median and p90 error on what was held out: fitted, shipped, promised alone")
    found = []
    for profile in profiles():
        found.append(judged(profile))
        print(line(found[-1]), flush=True)
    return {"table": found, "shown": not any(each["missing"] for each in found)}


def cpu_roofline(steps: list[Timed], name: str) -> Roofline:
    """This machine with shares that come close to the steps of a run."""
    shape = SHAPES[{"llama130m": "llama-130m"}.get(name, name)]
    known = [(Load(each.tokens, each.rows, each.pairs, each.read), each.seconds) for each in steps]
    known = known[:: max(1, len(known) // 200)]

    def cost(found: Mapping[str, float]) -> Roofline:
        return Roofline(replace(CPU, efficiency=replace(CPU.efficiency, **found)), shape, block=32)

    def loss(found: Mapping[str, float]) -> float:
        priced = cost(found)
        off = [sum(priced.stage_seconds(load)) / seconds - 1.0 for load, seconds in known]
        return float(np.mean(np.minimum(1.0, np.abs(off))))

    return cost(search(loss, ON_CPU, dict.fromkeys(SHARES, 1.0)))


@dataclass(frozen=True, slots=True)
class Twice:
    """A cost that is wrong by as much again: the control."""

    cost: Cost

    def seconds(self, step: Step) -> float:
        """Twice what was learnt."""
        return 2 * self.cost.seconds(step)


MEASURES: dict[str, Callable[[Times, Times], float]] = {  # of a run with arrivals at random, and of all at once
    "makespan": lambda run, once: run.makespan,
    "makespan at once": lambda run, once: once.makespan,
    "first p50": lambda run, once: run.at(0.5),
    "first p99": lambda run, once: run.at(0.99),
}


def judge(
    measure: str, runs: list[Pair], predicted: Mapping[str, Pair], own: list[Pair]
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """How far off predictions of a measure are, and whether what was learnt is near enough; where all come at once,
    also that twice of it is not, or nothing would be shown."""
    of = MEASURES[measure]
    measured = sorted(of(*run) for run in runs)
    middle = measured[len(measured) // 2]
    spread = (measured[-1] - measured[0]) / middle
    allowed = max(LIMITS[measure], spread) if measure == "first p99" else LIMITS[measure]
    off = {each: of(*run) / middle - 1.0 for each, run in predicted.items()}
    off["own"] = float(np.median([of(*guess) / of(*run) - 1.0 for guess, run in zip(own, runs, strict=True)]))
    holds = abs(off["fitted"]) <= allowed and (measure != "makespan at once" or abs(off["twice"]) > allowed)
    said = ", ".join(f"{each} {1e3 * of(*run):.1f} ms ({off[each]:+.1%})" for each, run in predicted.items())
    said += f", each run from itself {off['own']:+.1%}"
    print(f"  {measure:16s} real {1e3 * middle:.1f} ms, spread {spread:.1%}; {said}; allowed {allowed:.0%}")
    return {"measured": measured, "spread": spread, "allowed": allowed, "off": off}, holds


def cpu(name: str) -> dict[str, Any]:
    """Learn from one real run, predict others, and run those five times."""
    from benchmarks.live import pretended, real, repeated, scheduler, traffic  # the only part that needs torch
    from benchmarks.prove_planning import model
    from shoal.build import build_engine
    from shoal.core.config import EngineConfig
    from shoal.sim.replay import written

    config = EngineConfig(model="" if name == "minnow" else str(model(name)))
    built = build_engine(config, useful_tokens=65_536)
    vocabulary = built.facts.vocab_size
    real(built, traffic(9, 20, math.inf, vocabulary))  # whatever is slow once
    whole, _ = real(built, traffic(0, 100, math.inf, vocabulary))
    rate = LOAD * 100 / whole.makespan
    count = round(rate * SECONDS)
    learnt, _ = real(built, traffic(1, count, rate, vocabulary))
    at_once = max(1, round(rate / LOAD * AT_ONCE))
    asked, crowd = traffic(2, count, rate, vocabulary), traffic(3, at_once, math.inf, vocabulary)
    runs, same, own = [], [], []
    load = os.getloadavg()[0]
    for _ in range(REPEATS):
        run, placed = real(built, asked)
        once, _ = real(built, crowd)
        same.append(written(repeated(built, placed, run.record)) == written(run.record.plans))
        mean = fit_cost(run.record.steps)
        own.append((pretended(built, asked, mean), pretended(built, crowd, mean)))  # without the machine's moods
        # millions of objects that the next run would have beside it
        runs.append((replace(run, record=None), replace(once, record=None)))
    steps = learnt.record.steps
    costs = {"fitted": fit_cost(steps), "linear": fit_linear(steps), "roofline": cpu_roofline(steps, name)}
    result: dict[str, Any] = {
        "rate": rate, "requests": count, "at_once": at_once, "steps": len(steps), "same_plans": same,
        "load_before": load, "scheduler": type(scheduler(built)).__name__,
        "cost": asdict(costs["fitted"]), "shares": asdict(costs["roofline"].hardware.efficiency),
    }  # fmt: skip
    built.close()
    costs["twice"] = Twice(costs["fitted"])
    predicted = {each: (pretended(built, asked, cost), pretended(built, crowd, cost)) for each, cost in costs.items()}
    holds = all(same)
    print(f"{name}: {count} requests at {rate:.1f}/s, {len(steps)} steps; the same plans again: {same}")
    for measure in MEASURES:
        result[measure], near = judge(measure, runs, predicted, own)
        holds = holds and near
    return result | {"shown": holds}


def main() -> int:
    """Calibrate, print, and say whether the claims hold. Parts that are not asked for stay as they were."""
    wanted = sys.argv[1:] or ["profiles", *MODELS]
    if not FOLDER.is_dir():
        print(f"{FOLDER} is not there: the measured profiles come with ../shared")
        return 1
    path = RESULTS / "calibration.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = {name: before[name] for name in ("profiles", *MODELS) if name in before}
    for name in wanted:
        parts[name] = gpu() if name == "profiles" else cpu(name)
    whole = all(measure in parts.get(name, {}) for name in MODELS for measure in MEASURES)  # a part may be older
    shown = whole and len(parts) == 1 + len(MODELS) and all(part["shown"] for part in parts.values())
    write_result("calibration", parts | {"shown": shown})
    return 0 if all(parts[name]["shown"] for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
