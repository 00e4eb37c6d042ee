"""Proof: prompt tokens computed are the plan's bound, at every block size and budget. See benchmarks/sharing.py.

Usage: python -m benchmarks.prove_bound [--small]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import workloads
from benchmarks.common import write_result
from benchmarks.sharing import Rows, cases, job
from shoal.jobs.options import Order

PROVES = (
    "shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/sim", "shoal/client.py", "shoal/jobs",
    "benchmarks/sharing.py", "benchmarks/workloads.py",
)  # fmt: skip


def bound(folder: Path, files: dict[str, Rows], small: bool) -> list[dict[str, object]]:
    """Every file at every block size and budget, memory ample: computed equals the bound."""
    results = []
    blocks, budgets = ((16, 32), (64, 256, 2048)) if not small else ((32,), (256,))
    for (name, rows), block, budget in itertools.product(files.items(), blocks, budgets):
        began = time.monotonic()
        tokens = job(folder, rows, Order.PLAN, 400_000 // block, block, budget)
        holds = tokens["prompt_computed"] == tokens["prompt_bound"]
        results.append({"file": name, "block": block, "budget": budget, **tokens, "holds": holds})
        print(
            f"{name:9} block {block} budget {budget:4}: {tokens['prompt']:9,} prompt tokens, bound "
            f"{tokens['prompt_bound']:8,}, computed {tokens['prompt_computed']:8,} (+{tokens['prompt_last']} last) "
            f"{'ok' if holds else 'FAILS'} [{time.monotonic() - began:.0f} s]", flush=True,
        )  # fmt: skip
    return results


def main() -> int:
    """Run every file; exit code 1 when a claim does not hold."""
    small = "--small" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        workloads.words_only_model(Path(name) / "model")
        results = bound(Path(name), cases(small), small)
    shown = all(r["holds"] for r in results)
    if not small:
        write_result("bound", {"results": results, "shown": shown})
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
