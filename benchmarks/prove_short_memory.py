"""Proof: what memory short of the prefixes costs, in planned order and in file order. See benchmarks/sharing.py.

Usage: python -m benchmarks.prove_short_memory
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from pathlib import Path

from benchmarks import workloads
from benchmarks.common import write_result
from benchmarks.sharing import Rows, cases, job
from shoal.jobs.options import Order

PROVES = (
    "shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/sim", "shoal/client.py", "shoal/jobs",
    "benchmarks/sharing.py", "benchmarks/workloads.py",
)  # fmt: skip


def heads_of(name: str, rows: Rows) -> int:
    """Tokens of the shared prefixes of a file: W1's 8 × 1,024, or BBH's per-task prompts."""
    if name == "W1":
        return 8 * 1024
    ordered = sorted(prompt for prompt, _ in rows)
    total = 0
    shared: list[int] = []
    for a, b in itertools.pairwise(ordered):
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if n > 200:
            shared = a[:n] if not shared else shared[: min(n, len(shared))]
        elif shared:
            total, shared = total + len(shared), []
    return total + len(shared)


def short(folder: Path, files: dict[str, Rows]) -> list[dict[str, object]]:
    """KV for 30 % of the shared prefixes and the own tokens of 32 rows, in planned order and in file order."""
    results = []
    for name, limit in (("W1", 0.8), ("BBH", 0.65)):
        rows = list(files[name])
        if name == "BBH":
            random.Random(7).shuffle(rows)  # the file as users have it is sorted by task already
        heads = heads_of(name, rows)
        prompts = sum(len(prompt) for prompt, _ in rows)
        longest = max(len(p) for p, _ in rows)
        average = sum(length for _, length in rows) / len(rows)
        planned = job(folder, rows, Order.PLAN, 400_000 // 32, 32, 2048)
        own = (planned["prompt_bound"] - heads) / len(rows) + average
        blocks = max(int((0.3 * heads + 32 * own) / 32), -(-(longest + 40) // 32))
        runs = {
            "planned": job(folder, rows, Order.PLAN, blocks, 32, 2048),
            "input, known future": job(folder, rows, Order.INPUT, blocks, 32, 2048),
            "input, LRU": job(folder, rows, Order.INPUT, blocks, 32, 2048, lru=True),
        }
        again = {key: tokens["prompt_recomputed"] for key, tokens in runs.items()}
        ratio = again["input, known future"] / max(again["input, LRU"], 1)
        holds = again["planned"] == 0 and ratio <= limit
        results.append(
            {"file": name, "prefix_tokens": heads, "prompt_tokens": prompts, "kv_tokens": blocks * 32, "runs": runs,
             "infinite_cache_bound": planned["prompt_bound"], "ratio": ratio, "limit": limit, "holds": holds}
        )  # fmt: skip
        print(
            f"{name:4} {blocks * 32:,} tokens of KV for {heads:,} of prefixes; bound {planned['prompt_bound']:,}; "
            f"recomputed: {again}; known future / LRU = {ratio:.3f} (at most {limit}) {'ok' if holds else 'FAILS'}",
            flush=True,
        )
    return results


def main() -> int:
    """Run both files; exit code 1 when a claim does not hold."""
    with tempfile.TemporaryDirectory() as name:
        workloads.words_only_model(Path(name) / "model")
        results = short(Path(name), cases(small=False))
    shown = all(r["holds"] for r in results)
    write_result("short_memory", {"results": results, "shown": shown}, seed=7)
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
