"""Proof: the plan's bound is reached, and what memory short of the prefixes costs.

Runs whole jobs (reader, plan, feed, scheduler, journal, writer) over an executor whose keys and values are the token
ids, so every token of context is checked and no weights are needed. Usage: python -m benchmarks.prove_sharing [--small]
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import workloads
from benchmarks.common import write_result
from shoal.client import InProcess
from shoal.core.clock import SimClock
from shoal.engine import Engine
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.run import run_job
from shoal.kv.tree import Node
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget, Reach, View
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor
from shoal.text.tokenizer import Tokenizer

PROVES = ("shoal/core", "shoal/kv", "shoal/sched", "shoal/engine.py", "shoal/sim", "shoal/client.py", "shoal/jobs")
Rows = list[tuple[list[int], int]]


class LeastRecentlyUsed(BatchPolicy):
    """The control: the same batching and admission, blind to the future."""

    def worth(self, node: Node) -> float:
        """The longest unused yields first."""
        return node.last_use

    def _better_later(self, peak: float, reach: Reach, view: View) -> bool:
        return False


def job(
    folder: Path, rows: Rows, order: Order, blocks: int, block: int, budget: int, lru: bool = False
) -> dict[str, int]:
    """Run the rows as a job and return the report's token counts, with preemptions and steps."""
    policy = (LeastRecentlyUsed if lru else BatchPolicy)(Budget(budget, 256))
    scheduler = Scheduler(policy, blocks, block)
    engine = Engine(scheduler, EchoExecutor(blocks, block), SimClock(), ahead=1)
    options = JobOptions(
        input=workloads.write_rows(folder / "in.jsonl", rows), output=folder / "out.jsonl",
        model=str(folder / "model"), order=order, restart=True, quiet=True,
    )  # fmt: skip
    code = run_job(options, InProcess(engine))
    report = json.loads((folder / "out.jsonl.shoal" / "report.json").read_text())
    assert code == 0, report["errors"]
    assert report["rows"]["ok"] == len(rows)
    return {**report["tokens"], "preemptions": scheduler.counters.preemptions, "steps": scheduler.counters.steps}


def cases(small: bool) -> dict[str, Rows]:
    """The files, as token ids with output lengths."""
    tokenizer = Tokenizer.load(workloads.QWEN2)
    gsm8k, bbh = workloads.gsm8k(), workloads.bbh()
    if small:
        gsm8k, bbh = gsm8k[:60], bbh[::120]
    return {
        "GSM8K": [(list(ids), 16) for ids in tokenizer.encode_batch(gsm8k)],
        "BBH": [(list(ids), 8) for ids in tokenizer.encode_batch(bbh)],
        "W1": workloads.bench("W1"),
        "W4": workloads.bench("W4"),
        **{f"random {seed}": workloads.hierarchy(seed, 60 if small else 400) for seed in range(2 if small else 4)},
    }


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


def short(folder: Path, files: dict[str, Rows], small: bool) -> list[dict[str, object]]:
    """KV for 30 % of the shared prefixes and the own tokens of 32 rows, in planned order and in file order."""
    import random

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
    """Run both parts; exit code 1 when a claim does not hold."""
    small = "--small" in sys.argv
    only = next((a for a in sys.argv[1:] if a in ("bound", "short")), None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workloads.words_only_model(folder / "model")
        files = cases(small)
        results = {
            "bound": bound(folder, files, small) if only != "short" else [],
            "short": short(folder, files, small) if only != "bound" else [],
        }
    if not small and only is None:
        write_result("sharing", {"results": results}, seed=7)
    return 0 if all(r["holds"] for part in results.values() for r in part) else 1


if __name__ == "__main__":
    sys.exit(main())
