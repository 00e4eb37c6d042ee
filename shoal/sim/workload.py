"""Who asks for what and when: lengths of a law or a trace, put to times, as programs.

It knows laws, traces and seeds; it must not know instances or policies. The same arguments make the same programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.core.errors import UsageError
from shoal.core.types import Promise
from shoal.sim.laws import LAWS, Law, bursts, find_law, poisson, scaled
from shoal.sim.program import Program, Turn
from shoal.sim.traces import Row, clients, histories, own, pieces_of, read_trace

GRAIN = 256  # answers' limits are multiples of it: one for all, above the longest
NOON = 43200.0  # seconds: where ServeGen's day is taken from
DAY = 86400.0

Source = Law | list[Row] | Mapping[str, Any] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come: "poisson", "gamma" with a coefficient of variation, "closed" with so many clients, "trace"
    as the trace has it or at a rate, "once" all together."""

    kind: str
    rate: float | None = None  # a second
    variation: float = 1.0
    clients: int = 0

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """poisson:RATE, gamma:RATE:CV, closed:CLIENTS, trace, trace:RATE or once."""
        kind, *numbers = text.split(":")
        try:
            given = [float(number) for number in numbers]
        except ValueError:
            given = [0.0]
        if all(number > 0 for number in given):
            match kind, given:
                case "poisson", [rate]:
                    return cls(kind, rate)
                case "gamma", [rate, variation]:
                    return cls(kind, rate, variation)
                case "closed", [number] if number == int(number):
                    return cls(kind, clients=int(number))
                case "trace", [] | [_]:
                    return cls(kind, given[0] if given else None)
                case "once", []:
                    return cls(kind)
        raise UsageError(
            f"arrivals {text!r}: give poisson:RATE, gamma:RATE:CV, closed:CLIENTS, trace, trace:RATE or once, "
            "with numbers above 0"
        )

    def at(self, rate: float) -> Arrivals:
        """The same at another rate."""
        return replace(self, rate=rate)

    def times(self, count: int, seed: int, trace: Sequence[float] | None) -> list[float]:
        """When so many requests come. `trace`: when they came where they are from, if that is known."""
        if self.kind == "trace":
            if trace is None:
                raise UsageError("arrivals of a trace need a trace with times: give poisson:RATE or closed:CLIENTS")
            return scaled(trace, self.rate)
        if self.kind in ("once", "closed"):
            return [0.0] * count
        assert self.rate is not None
        return (
            bursts(count, self.rate, self.variation, seed) if self.kind == "gamma" else poisson(count, self.rate, seed)
        )


def find_source(name: str) -> Source:
    """A law by its name, or a trace by its file."""
    law = find_law(name)
    if law is not None:
        return law
    if not Path(name).exists():
        known = ", ".join([*LAWS, "fixed:PROMPT:ANSWER", "uniform:LOW:HIGH:LOW:HIGH", "zipf:LOW:HIGH:RATIO"])
        raise UsageError(f"there is no file {name}, and it is no law: laws are {known}")
    return read_trace(Path(name))


def programs(
    source: Source, arrivals: Arrivals, count: int | None, seed: int, promise: Promise | None = None,
    deadline: float = float("inf"),
) -> list[Program]:  # fmt: skip
    """`count` requests or programs of the source in order of their beginnings; None takes all that a trace has."""
    if isinstance(source, list) and source and isinstance(source[0], dict):
        return _agents(source, arrivals, count, seed, promise, deadline)
    rows, timed = _rows(source, arrivals, count, seed)
    if not rows:
        raise UsageError("the workload is empty: give at least one request")
    limit = -(-max(row.answer for row in rows) // GRAIN) * GRAIN
    turns = [Turn(pieces_of(row, number), row.answer, limit) for number, row in enumerate(rows)]
    if arrivals.kind == "closed":
        shared: Iterator[Turn] = iter(turns)
        wanted = min(arrivals.clients, len(turns))
        return [Program(f"client{k}", 0.0, shared, False, "", promise, deadline) for k in range(wanted)]
    times = arrivals.times(len(rows), seed, [row.at for row in rows] if timed else None)
    found = [
        Program(f"r{number}", at, (turn,), True, row.group, promise, deadline)
        for number, (row, turn, at) in enumerate(zip(rows, turns, times, strict=True))
    ]
    return sorted(found, key=lambda program: program.at)


def drawn(source: Source, arrivals: Arrivals, count: int | None) -> bool:
    """Whether another seed would make other programs."""
    if arrivals.kind in {"poisson", "gamma"} or not isinstance(source, list):
        return True
    rows = [row for row in source if isinstance(row, Row)]
    return len(rows) < len(source) or (count is not None and not any(row.at for row in rows))


def _rows(source: Source, arrivals: Arrivals, count: int | None, seed: int) -> tuple[list[Row], bool]:
    """Rows, and whether they say when they came."""
    if callable(source):
        prompts, answers = source(count or 1000, np.random.default_rng([seed, 0]))
        return [Row(0.0, p, a) for p, a in zip(prompts.tolist(), answers.tolist(), strict=True)], False
    if isinstance(source, Mapping):
        seconds, rows = 600.0, clients(source, 600.0, seed, NOON)
        while len(rows) < (count or 0) and seconds < DAY:
            seconds *= 2
            rows = clients(source, seconds, seed, NOON)
        return rows[:count], True
    rows = [row for row in source if isinstance(row, Row)]
    timed = any(row.at for row in rows)
    if timed or count is None:
        return rows[:count], timed
    luck = np.random.default_rng([seed, 0])  # lengths only: drawn from what there is
    return [rows[i] for i in luck.integers(0, len(rows), count).tolist()], False


def _agents(
    entries: list[Any], arrivals: Arrivals, count: int | None, seed: int, promise: Promise | None, deadline: float
) -> list[Program]:
    limit = 1024
    known = histories(entries, limit, seed)
    if not known:
        raise UsageError("the histories have no turn of an assistant")
    if arrivals.kind == "closed":
        raise UsageError("programs wait for themselves: give poisson:RATE or gamma:RATE:CV in place of closed")
    number = count or len(known)
    found = [_again(known[k % len(known)], k // len(known), k) for k in range(number)]
    times = arrivals.times(number, seed, None)
    return [
        replace(program, at=at, promise=promise, deadline=deadline)
        for program, at in sorted(zip(found, times, strict=True), key=lambda pair: pair[1])
    ]


def _again(program: Program, round: int, number: int) -> Program:
    """The same once more, with other words after its first piece, which all begin with."""
    if not round:
        return program
    turns = tuple(
        replace(turn, pieces=tuple(
            piece if not (place or at) else (piece[0] ^ own(round), piece[1]) for at, piece in enumerate(turn.pieces)
        ))
        for place, turn in enumerate(program.turns)
    )  # fmt: skip
    return replace(program, id=f"p{number}", turns=turns)
