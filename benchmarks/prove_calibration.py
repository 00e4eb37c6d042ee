"""Proof: predicted times against measured ones, of profiles of GPUs and of real runs on this CPU.

`profiles`: a few parameters are fitted to a part of each measured profile and judged on the rest, beside what is in
`shoal/sim/hardware.py` and beside the makers' promises alone, as a control.

    python -m benchmarks.prove_calibration [profiles]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.common import write_result
from benchmarks.gpu_profiles import FOLDER, Profile, profiles
from shoal.sim.fit import search
from shoal.sim.hardware import Hardware

PROVES = ("shoal/sim", "shoal/sched", "shoal/engine.py", "shoal/kv", "shoal/core", "benchmarks/gpu_profiles.py")
LIMIT = 0.15  # median error of a profile's held-out points


def errors(profile: Profile, machine: Hardware) -> np.ndarray:
    """Absolute relative errors of the held-out points."""
    keys = [key for key in profile.points if profile.judged(key)]
    return np.array([abs(profile.price(machine, key) / profile.points[key] - 1.0) for key in keys])


def judged(profile: Profile) -> dict[str, Any]:
    """Fit, and say how far off the rest is."""
    keys = profile.fit_points()

    def loss(found: dict[str, float]) -> float:
        machine = profile.change(profile.shipped, found)
        return float(np.mean([min(1.0, abs(profile.price(machine, k) / profile.points[k] - 1.0)) for k in keys]))

    shares = {"compute", "memory", "hidden", "light", "attention", "reading", "share", "soon_share", "usable"}
    found = search(loss, profile.start, dict.fromkeys(shares, 1.0)) if profile.start else {}
    fitted = profile.change(profile.shipped, found) if found else profile.shipped
    machines = {"fitted": fitted, "shipped": profile.shipped, "promised": profile.shipped.bare()}
    result: dict[str, Any] = {"name": profile.name, "held": profile.held, "note": profile.note, "found": found}
    for name, machine in machines.items():
        off = errors(profile, machine)
        result[name] = {"median": float(np.median(off)), "p90": float(np.quantile(off, 0.9))}
    result["fit_points"], result["held_points"] = len(keys), sum(profile.judged(key) for key in profile.points)
    return result


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{result[name]['median']:6.1%} {result[name]['p90']:7.1%}" for name in ("fitted", "shipped", "promised")]
    return f"{result['name']:58s} {result['fit_points']:4d} {result['held_points']:5d}  {'   '.join(cells)}"


def gpu() -> list[dict[str, Any]]:
    """The table of profiles."""
    print(f"{'profile':58s}  fit  held  median and p90 error on what was held out: fitted, shipped, promised alone")
    found = []
    for profile in profiles():
        found.append(judged(profile))
        print(line(found[-1]), flush=True)
        print("   ", {name: float(f"{value:.3g}") for name, value in found[-1]["found"].items()}, flush=True)
    return found


def main() -> int:
    """Calibrate, print, and say whether the claims hold."""
    wanted = sys.argv[1:] or ["profiles"]
    result: dict[str, Any] = {}
    if "profiles" in wanted:
        if not FOLDER.is_dir():
            print(f"{FOLDER} is not there: the measured profiles come with ../shared")
            return 1
        result["profiles"] = gpu()
    write_result("calibration", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
