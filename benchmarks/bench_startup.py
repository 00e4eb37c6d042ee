"""How long the command line takes before it does anything, and how much memory the parent of a job holds then.

python -m benchmarks.bench_startup
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from benchmarks.common import ROOT, write_result

PROGRAMS = {
    "python": "pass",
    "shoal --help": "import sys; sys.argv = ['shoal', '--help']; from shoal.cli import main; main()",
    "parent of a job": "import shoal.jobs.run",
    "torch": "import torch",
}
PEAK = """import atexit, resource, sys
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))"""
ROUNDS = 7


def once(program: str) -> tuple[float, int]:
    """Seconds and peak bytes of a fresh interpreter."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{PEAK}\n{program}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return time.monotonic() - began, int(done.stderr.split()[-1]) * 1024


def main() -> None:
    """Measure the programs in turn, so that a busy moment touches all of them."""
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, program in PROGRAMS.items():
            seen[name].append(once(program))
    result = {
        name: {
            "median_seconds": round(statistics.median(seconds for seconds, _ in runs), 3),
            "least_seconds": round(min(seconds for seconds, _ in runs), 3),
            "peak_bytes": max(peak for _, peak in runs),
        }
        for name, runs in seen.items()
    }
    print(json.dumps(result, indent=1))
    write_result("bench_startup", {"rounds": ROUNDS, "programs": result})


if __name__ == "__main__":
    main()
