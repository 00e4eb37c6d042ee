"""Requests of three kinds of service, one of each in three: live chats, answers with a deadline, and programs of calls.

It knows what each kind is promised; it must not know who keeps it. The mix of JITServe (NSDI 2026, arXiv 2504.20068).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shoal.core.types import Promise
from shoal.sim.program import Program, Turn
from shoal.sim.workload import Arrivals, Source, programs

LIVE, BY_DEADLINE, COMPOUND = "live", "deadline", "compound"


def three_classes(
    source: Source, arrivals: Arrivals, count: int, seed: int, promise: Promise, deadline: float,
    stages: tuple[int, int] = (2, 4), pause: float = 1.0,
) -> list[Program]:  # fmt: skip
    """`count` programs of a source of single requests, as many of each class as can be, in an order that the seed
    decides. A compound one has between `stages` turns, a tool's exponential `pause` [s] between them, and `deadline`
    seconds for each; its group, as the others', is its class."""
    luck = np.random.default_rng([seed, 2])
    kinds = luck.permutation([(LIVE, BY_DEADLINE, COMPOUND)[k % 3] for k in range(count)]).tolist()
    turns = [int(luck.integers(*stages, endpoint=True)) if kind == COMPOUND else 1 for kind in kinds]
    asked = programs(source, Arrivals("once"), sum(turns), seed)
    rows = [turn for program in asked for turn in program.turns]
    found, at = [], 0
    for number, (kind, several, when) in enumerate(zip(kinds, turns, arrivals.times(count, seed, None), strict=True)):
        some = tuple(rows[at : at + several])
        at += several
        if kind == LIVE:
            found.append(Program(f"r{number}", when, some, group=kind, promise=promise))
        elif kind == BY_DEADLINE:
            found.append(Program(f"r{number}", when, some, group=kind, deadline=deadline))
        else:
            calls = tuple(_call(turn, place, several, pause, luck) for place, turn in enumerate(some))
            found.append(Program(f"r{number}", when, calls, group=kind, deadline=deadline * several))
    return found


def _call(turn: Turn, place: int, several: int, pause: float, luck: np.random.Generator) -> Turn:
    waits = float(luck.exponential(pause)) if place else 0.0
    return replace(turn, pause=waits, tool="tool" if place < several - 1 else "")
