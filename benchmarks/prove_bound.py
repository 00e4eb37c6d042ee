"""Proof: prompt tokens computed are the plan's bound, at every block size and budget. See benchmarks/sharing.py.

Rows that ask for what another asks for, and rows that a cache knows, count nothing in it.

Usage: python -m benchmarks.prove_bound [--small]
"""

from __future__ import annotations

import itertools
import random
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


def free(folder: Path, files: dict[str, Rows]) -> list[dict[str, object]]:
    """Copies of rows, and rows that a cache knows, count nothing: the bound is that of the others, and is met."""
    results = []
    for name, rows in files.items():
        luck, cache = random.Random(name), folder / f"cache of {name}"
        distinct = list({(tuple(prompt), length): (prompt, length) for prompt, length in rows}.values())
        thrice = distinct * 3
        luck.shuffle(thrice)
        edited = sorted(luck.sample(range(len(distinct)), max(1, len(distinct) // 100)))
        longer = max(length for _, length in distinct) + 1  # a question that nobody has asked
        alone = [(distinct[i][0], longer) for i in edited]
        changed = [alone[edited.index(i)] if i in edited else row for i, row in enumerate(distinct)]
        size = Order.PLAN, 400_000 // 32, 32, 256
        least, once = job(folder, alone, *size), job(folder, distinct, *size, cache=cache)
        copied, recalled = job(folder, thrice, *size), job(folder, changed, *size, cache=cache)
        holds = (
            copied["prompt_computed"] == copied["prompt_bound"] == once["prompt_bound"] == once["prompt_computed"]
            and copied["duplicates"] == 2 * len(distinct)
            and recalled["prompt_computed"] == recalled["prompt_bound"] == least["prompt_bound"]
            and recalled["cached"] >= len(distinct) - 2 * len(edited)
        )
        found = {"file": name, "rows": len(distinct), "once": once, "thrice": copied, "edited": recalled}
        results.append({**found, "edited_rows_alone": least, "holds": holds})
        print(
            f"{name:9} bound {once['prompt_bound']:8,} once, computed {copied['prompt_computed']:8,} thrice; "
            f"{len(edited)} rows edited: {recalled['prompt_computed']:6,} computed, {recalled['cached']} known "
            f"{'ok' if holds else 'FAILS'}", flush=True,
        )  # fmt: skip
    return results


def main() -> int:
    """Run every file; exit code 1 when a claim does not hold."""
    small = "--small" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        workloads.words_only_model(Path(name) / "model")
        files = cases(small)
        results, without = bound(Path(name), files, small), free(Path(name), files)
    shown = all(r["holds"] for r in results + without)
    if not small:
        write_result("bound", {"results": results, "free_rows": without, "shown": shown})
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
