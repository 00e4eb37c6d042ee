"""What the same bits in any company cost: W1 to W4 at full size with the random 387M-parameter model, bf16, by turns
with kernels built to make sums in whatever order is faster (SHOAL_FREE_ORDER in CMakeLists.txt).

It knows what has to hold; it must not know how anything is computed or measured. Each extension has a process of its
own, which sleeps while another computes. Where a process's memory lies makes it up to 3 % faster or slower, so every
round has fresh ones, and a second process with the invariant kernels shows what is left of that. As another control,
rows in company are compared with rows alone, in both builds.

    python -m benchmarks.prove_invariance_cost [--rounds 5] [--scale 1.0] [--free EXTENSION]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import ROOT, write_result
from benchmarks.prove_planning import model
from shoal.bench.options import WORKLOADS
from shoal.bench.ours import Ours
from shoal.bench.workloads import make
from shoal.core.config import EngineConfig
from shoal.kernels import load, set_threads
from shoal.nn.arch import read_config

PROVES = ("shoal/kernels", "shoal/nn", "shoal/runtime", "shoal/sched", "shoal/kv", "shoal/bench", "CMakeLists.txt")
LIMIT = 1.03  # times the wall of kernels whose order is free
BUILT = Path("build") / "free_order"
SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))  # of the model's linear layers
ROWS = 64  # compared with every smaller number of them


def build() -> Path:
    """The extension whose order is free, built here as a wheel's is."""
    options = [f"build-dir={BUILT}/cmake", "cmake.define.SHOAL_FREE_ORDER=ON"]
    command = [sys.executable, "-m", "pip", "--quiet", "install", ".", "--no-deps", "--upgrade", "--target", str(BUILT)]
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")
    subprocess.run([*command, *(word for option in options for word in ("-C", option))], cwd=ROOT, check=True)
    return next((ROOT / BUILT / "shoal" / "kernels").glob("_cpu*.so"))


def differing() -> dict[str, int]:
    """How many rows of the model's linear layers get other bits in the company of 63 than in that of fewer."""
    kernels, generator = load("cpu"), torch.Generator().manual_seed(1)
    compared = differ = 0
    for outputs, inputs in SHAPES:
        packed = kernels.pack(torch.randn(outputs, inputs, generator=generator).bfloat16())
        x = torch.randn(ROWS, inputs, generator=generator).bfloat16()
        whole = kernels.logits(x, packed)  # float32: rounding to bf16 would hide most differences
        for rows in range(1, ROWS):
            found = kernels.logits(x[:rows].contiguous(), packed)
            compared += rows
            differ += int((found != whole[:rows]).any(1).sum())
    return {"compared": compared, "differ": differ}


def serve(scale: float) -> None:
    """Run the workloads named on standard input, one at a time, and say on standard output how long each took."""
    cores = len(os.sched_getaffinity(0))
    set_threads(cores)
    print(json.dumps(differing()), flush=True)
    vocab = read_config(model()).vocab_size
    workloads = {name: make(name, vocab, scale) for name in WORKLOADS}
    config = EngineConfig(model=str(model()), weights="bf16", threads=cores)
    ours = Ours(config, list(workloads.values()))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        span = ours.run(workloads[line.strip()]).span
        print(json.dumps({"wall": span.wall, "cpu": span.cpu, "others": span.others}), flush=True)
    ours.close()


class Worker:
    """A process with an extension: `extension` None is the installed one."""

    def __init__(self, extension: Path | None, scale: float) -> None:
        serving = f"from benchmarks.prove_invariance_cost import serve; serve({scale!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if extension is not None:
            serving, environment["SHOAL_CHECKED"] = f"import tools.checked_extension; {serving}", str(extension)
        self._process = subprocess.Popen(
            [sys.executable, "-c", serving], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.differing = self._read()
        self._read()

    def run(self, workload: str) -> dict[str, float]:
        """Wall and CPU seconds of a workload."""
        assert self._process.stdin is not None
        self._process.stdin.write(workload + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measured process ended with code {self._process.wait()}")
        return json.loads(line)


Runs = dict[str, dict[str, list[dict[str, float]]]]  # by workload and way


def run_round(number: int, ways: dict[str, Path | None], scale: float, runs: Runs) -> dict[str, dict[str, int]]:
    """Every workload once each way, in processes of this round. Returns what `differing` found."""
    turn = number % len(ways)  # no way is always the first, to be started or to run
    order = [*ways][turn:] + [*ways][:turn]
    workers = {way: Worker(ways[way], scale) for way in order}
    for name in WORKLOADS:
        for way in order:
            runs[name][way].append(workers[way].run(name))
    for worker in workers.values():
        worker.close()
    walls = {name: [round(found[way][-1]["wall"], 2) for way in ways] for name, found in runs.items()}
    print(f"round {number + 1}, seconds {', '.join(ways)}: {walls}", flush=True)
    return {way: workers[way].differing for way in ways}


def times(found: dict[str, list[dict[str, float]]], way: str, other: str, what: str = "wall") -> float:
    """The median over rounds of what one way takes for what the other takes."""
    return median(a[what] / b[what] for a, b in zip(found[way], found[other], strict=True))


def measured(free: Path, rounds: int, scale: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """The numbers, and what holds."""
    ways = {"invariant": None, "free": free.resolve(), "again": None}
    runs: Runs = {name: {way: [] for way in ways} for name in WORKLOADS}
    for number in range(rounds):
        control = run_round(number, ways, scale, runs)
    rows = {
        name: {
            **{way: {what: median(run[what] for run in found[way]) for what in ("wall", "cpu")} for way in ways},
            "cost": times(found, "invariant", "free"),
            "cpu_cost": times(found, "invariant", "free", "cpu"),
            "same_again": times(found, "invariant", "again"),
        }
        for name, found in runs.items()
    }
    holds = {
        f"at most {LIMIT} x the wall without it": all(row["cost"] <= LIMIT for row in rows.values()),
        "no row differs by its company": control["invariant"]["differ"] == 0,
        "control: rows differ where the order is free": control["free"]["differ"] > 0,
    }
    return {"rounds": rounds, "scale": scale, "workloads": rows, "rows_by_company": control, "runs": runs}, holds


def main() -> int:
    """Print what holds; 1 when something does not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--free", type=Path, help="an extension whose order is free, already built")
    asked = parser.parse_args()
    numbers, holds = measured(asked.free or build(), asked.rounds, asked.scale)
    for name, row in numbers["workloads"].items():
        print(
            f"{name}: {row['invariant']['wall']:.2f} s, {row['cost']:.3f} x the wall of free order, "
            f"{row['cpu_cost']:.3f} x its CPU seconds; itself again {row['same_again']:.3f}"
        )
    print(numbers["rows_by_company"])
    for name, held in holds.items():
        print(f"{name}: {'holds' if held else 'DOES NOT HOLD'}")
    whole = asked.scale == 1.0 and asked.rounds >= 5
    write_result("invariance_cost", {**numbers, "holds": holds, "shown": whole and all(holds.values())})
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
