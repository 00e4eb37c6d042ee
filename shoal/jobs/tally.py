"""A report from what a job has noted: its journal's rows, what it has spent, and the facts of its plan.

It must not know whether the job runs, has ended or was killed: it counts what is there.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from shoal.core.errors import StateError, fault_of
from shoal.jobs.journal import NAME as JOURNAL
from shoal.jobs.journal import Status
from shoal.jobs.look import View, is_running
from shoal.jobs.report import NAME, Again, Failures, Report, Reused, Rows, Seconds, Sent, Slow, Tokens, read_report
from shoal.jobs.shares import engines_of
from shoal.jobs.state import FINISHED, folder_of

FACTS = "facts"  # key in the journal: a Report of what is known before anything was answered
SPENT = "spent"  # key in the journal
SLOWEST = 5  # rows that are named


def code_of(status: Status, noted: Mapping[str, object]) -> str:
    """The error code of a row that is not ok, by what the journal has of it."""
    return str(noted.get("code", f"batch_{status}"))


def tally(facts: Report, stats: Iterable[tuple[int, Status, str]], spent: Mapping[str, float]) -> Report:
    """The facts with what has come of the rows, and what that has cost."""
    ended, errors = Counter[Status](), dict[str, Failures]()
    output = looped = 0
    free = Counter[str]()
    served = Counter[str]()  # tokens as servers count them
    slow: list[tuple[float, int, Slow]] = []
    for line, status, text in stats:
        noted = json.loads(text)
        ended[status] += 1
        tokens = noted.get("completion_tokens", 0) if status == "ok" else 0
        output += tokens
        looped += "loop_period" in noted
        if facts.endpoints:
            served["prompt"] += noted.get("prompt_tokens", 0)
            served["cached"] += noted.get("cached_tokens", 0)
        if "copy_of" in noted or "cache" in noted:
            kind = "cached" if "cache" in noted else "copied"
            free[kind] += status == "ok" or kind == "cached"
            free[kind + " prompt"] += noted["prompt_saved"]
            free[kind + " output"] += tokens
        elif "run_seconds" in noted:
            heapq.heappush(slow, (noted["run_seconds"], -line, slow_row(line, noted)))
            if len(slow) > SLOWEST:
                heapq.heappop(slow)
        if status != "ok":
            add_failure(errors, code_of(status, noted), line, noted.get("message", ""))
    spent = Counter(spent)
    if facts.endpoints:
        computed = served["prompt"] - served["cached"] - free["copied prompt"] - free["cached prompt"]
        facts = replace(
            facts, tokens=Tokens(served["prompt"], computed),
            sent=Sent(int(spent["requests"]), int(spent["refused"]), int(spent["broken"]), served["cached"]),
        )  # fmt: skip
        spent.update(prompt_computed=computed - spent["prompt_computed"])
    computed = int(spent["prompt_computed"] - spent["prompt_last"])
    again = again_of(max(0, computed - facts.tokens.prompt_bound), spent)
    return replace(
        facts,
        rows=Rows(facts.rows.total, ended["ok"], ended["failed"], ended["expired"], ended["cancelled"]),
        tokens=Tokens(
            facts.tokens.prompt, facts.tokens.prompt_bound, computed, max(0, computed - facts.tokens.prompt_bound),
            again.last, output,
        ),
        reused=Reused(
            free["copied"], free["cached"], free["copied prompt"] + free["cached prompt"],
            free["copied output"] + free["cached output"], free["cached prompt"], free["cached output"],
        ),
        again=again,
        seconds=Seconds(spent["wall"], spent["cpu"], spent["load"], spent["plan"]),
        steps=int(spent["steps"]), peak_memory_bytes=int(spent["peak"]), peak_kv_bytes=int(spent["peak_kv"]),
        errors=errors, looped=looped, engines=engines_of(spent),
        slowest=[row for _, _, row in sorted(slow, key=lambda one: (-one[0], -one[1]))],
        runs=int(spent["runs"]), engine_restarts=int(spent["restarts"]),
    )  # fmt: skip


def again_of(tokens: int, spent: Mapping[str, float]) -> Again:
    """So many prompt tokens were computed more than once: why."""
    preempted = min(int(spent["prompt_preempted"]), tokens)
    apart = min(int(spent["apart"]), tokens - preempted)
    rest = tokens - preempted - apart
    restarted = spent["runs"] > 1 or spent["restarts"] > 0
    return Again(
        preempted, 0 if restarted else rest, rest if restarted else 0, int(spent["prompt_last"]),
        int(spent["output_preempted"]), apart,
    )  # fmt: skip


def add_failure(errors: dict[str, Failures], code: str, line: int, message: str) -> None:
    """Count a failed line among those of its code; the first is the example."""
    known = errors.get(code, Failures(0, line, message, fault_of(code)))
    errors[code] = replace(known, count=known.count + 1)


def slow_row(line: int, noted: Mapping[str, float]) -> Slow:
    """What the journal has of where a row's time went."""
    first = noted.get("first_seconds", 0.0)
    return Slow(
        line, noted.get("queue_seconds", 0.0), first, max(noted["run_seconds"] - first, 0.0),
        int(noted.get("prompt_tokens", 0)), int(noted.get("completion_tokens", 0)), int(noted.get("preemptions", 0)),
        int(noted.get("loop_period", 0)),
    )  # fmt: skip


def look_report(output: Path) -> Report:
    """The report of the job that writes `output`, at this moment: running, ended, or killed."""
    folder = folder_of(output)
    if (folder / NAME).is_file() and not (folder / JOURNAL).exists():
        return read_report(output)
    last = _last(output)
    with View(output) as view:
        facts = view.read(FACTS, Report)
        if facts is None:
            return _report_of_old(output)
        found = tally(facts, view.stats(), json.loads(view.meta(SPENT) or "{}"))
    running = is_running(output)
    if _last(output) != last:
        return look_report(output)  # it has ended, or was begun again, while its rows were counted
    if last is None:
        return replace(found, finished=False, running=running)
    return replace(
        found, files=last.files, verified=last.verified, exit_code=last.exit_code, finished=True, running=running,
        disagree=[] if last.rows == found.rows else [f"{NAME} counts {last.rows}, the journal {found.rows}"],
    )  # fmt: skip


def _last(output: Path) -> Report | None:
    """The report that a job has ended with; None of one that has not."""
    folder = folder_of(output)
    if not (folder / FINISHED).is_file() or not (folder / NAME).is_file():
        return None
    return read_report(output)


def _report_of_old(output: Path) -> Report:
    """A job that an earlier version began and ended has its report; of one that is under way nothing is known."""
    if not (folder_of(output) / NAME).is_file():
        raise StateError(
            f"{output}: an earlier version of shoal began this job, and did not note what a report needs before the "
            "end: let it end, or stop it and run the same command again"
        )
    return read_report(output)
