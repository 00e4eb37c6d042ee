"""A job read and planned as a run would do it, into a folder that is forgotten: the rows, the plan, the limits.

It must not know engines, times or how anything is shown. Reading, checking and planning are the run's own code.
"""

from __future__ import annotations

import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.core.errors import RowError
from shoal.jobs import plan_store as store
from shoal.jobs.arena import Arena
from shoal.jobs.crew import Crew, on_all_cores
from shoal.jobs.encode import Encoded, RowEncoder
from shoal.jobs.files import DiskFiles
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.plan import Order as PlanOrder
from shoal.jobs.plan import Plan, build_plan
from shoal.jobs.plan_order import NO_LIMIT, computed
from shoal.jobs.plan_sort import Ints, Prompts, overlaps
from shoal.jobs.prepare import Words, open_words
from shoal.jobs.read import Source
from shoal.jobs.schema import RowSpec
from shoal.jobs.spool import open_source


class Listening:
    """An encoder that is heard while it answers: how long each row's answers may get is not kept by the plan."""

    def __init__(self, encoder: RowEncoder | Crew) -> None:
        self._encoder = encoder
        self.limits = array("i")  # by row; -1 for a bad one
        self.certain = array("b")  # by row: whether its answers end at the limit and nowhere else

    def parse(self, raw: bytes | None) -> RowSpec:
        """As the encoder."""
        return self._encoder.parse(raw)

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[Sequence[Encoded | RowError]]:
        """As the encoder."""
        for results in self._encoder.stream(batches):
            for result in results:
                if isinstance(result, RowError):
                    self.limits.append(-1)
                    self.certain.append(False)
                else:
                    self.limits.append(result.max_tokens)
                    self.certain.append(result.expect is not None)
            yield results


@dataclass(frozen=True, slots=True)
class Looked:
    """A job before any model work. Arrays are by unit (a prompt of a row that is run) in file order."""

    words: Words
    source: Source
    plan: Plan
    prompts: Prompts  # of each the tokens that must be computed
    units: npt.NDArray[Any]  # plan_store.UNIT
    reach: Ints  # most tokens that a prompt may take from others
    limits: Ints  # most tokens of an answer
    certain: npt.NDArray[np.bool_]  # whether an answer has exactly so many
    order: Ints  # units as they are served
    overlap: Ints  # by place in that order: tokens that are there when its turn comes
    cost: Ints  # by place in that order: prompt tokens it computes
    seconds: float  # spent on all this


@contextmanager
def look(options: JobOptions) -> Iterator[Looked]:
    """Read and plan a job as `shoal run` with these options would. What a run refuses as a whole is refused here."""
    began = time.monotonic()
    words, files = open_words(options), DiskFiles()
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        folder = Path(scratch)
        with open_source(options.input, folder, files, sys.stdin.buffer) as source:
            listening = Listening(on_all_cores(words.encoder, words.info, source.size))
            order: PlanOrder = "input" if options.order is Order.INPUT else words.encoder.order
            plan = build_plan(source, listening, folder / "plan", order, words.encoder.fingerprint)
            yield _facts(words, source, plan, listening, began)


def _facts(words: Words, source: Source, plan: Plan, listening: Listening, began: float) -> Looked:
    arrays = store.load_arrays(plan.folder)
    units, order = np.asarray(arrays["units"]), np.asarray(arrays["order"]).astype(np.int64)
    goal, offset, root, reach = (units[name].astype(np.int64) for name in ("goal", "offset", "root", "reach"))
    reach[reach < 0] = NO_LIMIT
    prompts = Prompts(Arena(plan.folder / store.ARENA).padded, offset, goal, root)
    overlap = np.zeros(len(order), dtype=np.int64)
    if len(order):
        overlap[1:] = overlaps(prompts, order[:-1], order[1:])
    cost = computed(goal[order], overlap, reach[order])
    limits = np.frombuffer(listening.limits, dtype=np.int32) if listening.limits else np.zeros(0, dtype=np.int32)
    certain = np.frombuffer(listening.certain, dtype=np.int8) if listening.certain else np.zeros(0, dtype=np.int8)
    rows = units["row"]
    room = words.info.context - units["length"].astype(np.int64)
    return Looked(
        words=words, source=source, plan=plan, prompts=prompts, units=units, reach=reach,
        limits=np.minimum(limits[rows].astype(np.int64), room), certain=certain[rows] > 0,
        order=order, overlap=overlap, cost=cost, seconds=time.monotonic() - began,
    )  # fmt: skip
