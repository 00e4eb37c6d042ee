"""Whole jobs (reader, plan, feed, scheduler, journal, writer) over an executor whose keys and values are the token ids.

Every token of context is checked and no weights are needed. It must not know what is proved with it.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import workloads
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

Rows = list[tuple[list[int], int]]


class LeastRecentlyUsed(BatchPolicy):
    """The control: the same batching and admission, blind to the future."""

    def worth(self, node: Node) -> float:
        """The longest unused yields first."""
        return node.last_use

    def _better_later(self, peak: float, reach: Reach, view: View) -> bool:
        return False


def job(
    folder: Path, rows: Rows, order: Order, blocks: int, block: int, budget: int, lru: bool = False,
    cache: Path | None = None,
) -> dict[str, int]:  # fmt: skip
    """Run the rows as a job and return the report's token counts, with preemptions and steps."""
    policy = (LeastRecentlyUsed if lru else BatchPolicy)(Budget(budget, 256))
    scheduler = Scheduler(policy, blocks, block)
    engine = Engine(scheduler, EchoExecutor(blocks, block), SimClock(), ahead=1)
    options = JobOptions(
        input=workloads.write_rows(folder / "in.jsonl", rows), output=folder / "out.jsonl",
        model=str(folder / "model"), order=order, restart=True, quiet=True, cache=cache,
    )  # fmt: skip
    code = run_job(options, InProcess(engine))
    report = json.loads((folder / "out.jsonl.shoal" / "report.json").read_text())
    assert code == 0, report["errors"]
    assert report["rows"]["ok"] == len(rows)
    free = {"duplicates": report["reused"]["duplicates"], "cached": report["reused"]["cached"]}
    return {
        **report["tokens"],
        **free,
        "preemptions": scheduler.counters.preemptions,
        "steps": scheduler.counters.steps,
    }


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
