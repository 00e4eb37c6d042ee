"""A job's rows as programs to simulate: before it has run, or as it ran.

It knows plans and what became of rows; it must not know machines or policies.
"""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.core.errors import StateError
from shoal.core.types import TOKEN
from shoal.jobs import plan_store as store
from shoal.jobs.look import View
from shoal.jobs.options import JobOptions
from shoal.jobs.plan import Plan
from shoal.jobs.plan_sort import Ints
from shoal.jobs.state import folder_of
from shoal.jobs.supply import WINDOW
from shoal.jobs.tally import look_report
from shoal.preview.look import look
from shoal.sim.program import Given, Program, Turn


@dataclass(frozen=True, slots=True)
class Rows:
    """Turns in the plan's order, and what is known of the run they are from."""

    turns: list[Turn]
    name: str
    left_out: int = 0  # prompts of rows that failed, were answered from elsewhere, or have nothing to sample
    seconds: float | None = None  # what it took where it ran

    def fed(self, instances: int, running: int) -> int:
        """Requests in flight: of each engine those that run, at most, and those that wait there."""
        return min(instances * (WINDOW + running), len(self.turns))

    def programs(self, number: int) -> list[Program]:
        """So many in flight, and the next comes when one has ended, in the plan's order."""
        shared: Iterator[Turn] = iter(self.turns)
        return [Program(f"row{k}", 0.0, shared, keeps=False) for k in range(number)]


def of_file(options: JobOptions, count: int | None) -> Rows:
    """The rows of a file that has not run: answers that may end anywhere are taken to run to their limit."""
    with look(options) as looked:
        answers = looked.limits.copy()
        turns, left_out = _turns(looked.plan, answers, looked.limits, count)
        return Rows(turns, str(options.input), left_out)


def of_output(output: Path, count: int | None) -> Rows:
    """The rows of a job that has run, with the answers' lengths that it found. A StateError where its plan is gone."""
    folder = folder_of(output)
    summary = store.load_summary(folder)
    if summary is None:
        raise StateError(f"there is no finished plan in {folder}: a job can be replayed once it has begun to run")
    store.verify(folder, summary)
    plan = Plan(folder, summary, store.load_arrays(folder))
    lengths = _lengths(output)
    units = plan.units
    lines = plan.lines
    per_row: defaultdict[int, int] = defaultdict(int)
    for row, samples in zip(units["row"].tolist(), units["samples"].tolist(), strict=True):
        per_row[row] += samples
    answers = np.array(
        [-(-lengths.get(int(lines[row]), 0) // per_row[row]) for row in units["row"].tolist()], dtype=np.int64
    )
    turns, left_out = _turns(plan, answers, units["limit"].astype(np.int64), count)
    if not turns:
        raise StateError(f"no row of {output} has an answer to replay: let the job run first")
    return Rows(turns, str(output), left_out, look_report(output).seconds.wall)


def _lengths(output: Path) -> dict[int, int]:
    """Answer tokens of the lines that were answered."""
    found = {}
    with View(output) as view:
        for line, status, stats in view.stats():
            if status == "ok":
                found[line] = int(json.loads(stats).get("completion_tokens", 0))
    return found


def _turns(plan: Plan, answers: Ints, limits: Ints, count: int | None) -> tuple[list[Turn], int]:
    turns: list[Turn] = []
    left_out = 0
    roots = plan.units["root"]
    for unit, number in zip(plan.units_from(), plan.served.tolist(), strict=True):
        answer, limit = int(answers[number]), int(limits[number])
        if answer <= 0 or limit <= 0:
            left_out += unit.samples
            continue
        for sample in range(unit.samples):
            future = unit.futures[sample] if unit.futures is not None else None
            given = Given(array(TOKEN, unit.tokens), str(int(roots[number])), unit.index + sample, future)
            turns.append(Turn((), min(answer, limit), limit, given=given))
            if count is not None and len(turns) >= count:
                return turns, left_out
    return turns, left_out
