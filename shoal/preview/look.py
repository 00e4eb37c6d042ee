"""A job read and planned as a run would do it, into a folder that is forgotten: the rows, and the plan as arrays.

It must not know engines, times or how anything is shown. Reading, checking and planning are the run's own code.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.jobs import plan_store as store
from shoal.jobs.arena import Arena
from shoal.jobs.crew import on_all_cores
from shoal.jobs.files import DiskFiles
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.plan import Order as PlanOrder
from shoal.jobs.plan import Plan, build_plan
from shoal.jobs.plan_order import NO_LIMIT, computed
from shoal.jobs.plan_sort import Ints, Prompts, overlaps
from shoal.jobs.prepare import Words, open_words
from shoal.jobs.read import Source
from shoal.jobs.spool import open_source


@dataclass(frozen=True, slots=True)
class Served:
    """A plan as arrays: by unit (a prompt of a row that is run) in file order, or by place in serving order."""

    plan: Plan
    prompts: Prompts  # of each the tokens that must be computed
    units: npt.NDArray[Any]  # plan_store.UNIT
    reach: Ints  # most tokens that a prompt may take from others
    limits: Ints  # most tokens of an answer
    certain: npt.NDArray[np.bool_]  # whether an answer has exactly so many
    order: Ints  # units as they are served
    overlap: Ints  # by place in that order: tokens that are there when its turn comes
    cost: Ints  # by place in that order: prompt tokens it computes


@dataclass(frozen=True, slots=True)
class Looked(Served):
    """A job before any model work."""

    words: Words
    source: Source
    seconds: float  # spent on all this


@contextmanager
def look(options: JobOptions) -> Iterator[Looked]:
    """Read and plan a job as `shoal run` with these options would. What a run refuses as a whole is refused here."""
    began = time.monotonic()
    words, files = open_words(options), DiskFiles()
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        folder = Path(scratch)
        with open_source(options.input, folder, files, sys.stdin.buffer) as source:
            encoder = on_all_cores(words.encoder, words.info, source.size)
            order: PlanOrder = "input" if options.order is Order.INPUT else words.encoder.order
            plan = build_plan(source, encoder, folder / "plan", order, words.encoder.fingerprint)
            seconds = time.monotonic() - began
            yield looked_at(served(plan, words.info.context), words, source, seconds)


def served(plan: Plan, context: int, wanted: npt.NDArray[np.bool_] | None = None) -> Served:
    """The arrays of a plan for a model with so much context; of the `wanted` rows alone, where others have ended."""
    units, order = plan.units, plan.served
    if wanted is not None:
        order = order[wanted[units["row"][order]]]
    goal, offset, root, reach = (units[name].astype(np.int64) for name in ("goal", "offset", "root", "reach"))
    reach[reach < 0] = NO_LIMIT
    prompts = Prompts(Arena(plan.folder / store.ARENA).padded, offset, goal, root)
    overlap = np.zeros(len(order), dtype=np.int64)
    if len(order):
        overlap[1:] = overlaps(prompts, order[:-1], order[1:])
    room = context - units["length"].astype(np.int64)
    return Served(
        plan=plan, prompts=prompts, units=units, reach=reach,
        limits=np.minimum(units["limit"].astype(np.int64), room), certain=units["expect"] >= 0,
        order=order, overlap=overlap, cost=computed(goal[order], overlap, reach[order]),
    )  # fmt: skip


def looked_at(found: Served, words: Words, source: Source, seconds: float) -> Looked:
    """The same, beside what tells its texts."""
    fields = {name: getattr(found, name) for name in Served.__slots__}
    return Looked(**fields, words=words, source=source, seconds=seconds)
