"""The offline workloads as token ids, the same numbers for every engine, and as requests in a job's own plan order.

It knows what makes prompts share; it must not know engines, models or clocks.
W1: 8 groups of 16 rows, 1,024 tokens shared and 64 of their own, 32 out. W2: 64 rows that share nothing, lognormal
lengths. W3: 64 rows of 32 tokens, 128 out. W4: as W1, but 512 tokens common to all, 512 of the group, 16 out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shoal.bench.options import WORKLOADS
from shoal.core.errors import UsageError
from shoal.core.types import TOKEN, Request, Sampling, Tokens
from shoal.jobs.plan import build_plan
from shoal.jobs.plan_build import Place

LEAST_TOKEN = 300  # ids below are special tokens and single bytes in most vocabularies

Lines = list[tuple[str, list[int], int]]  # name, prompt, tokens of the answer


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, and how many tokens its answer has exactly."""

    name: str
    prompt: Tokens
    answer: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows in file order, which is shuffled: finding what they share is the engine's task."""

    name: str
    scale: float
    vocab_size: int
    rows: tuple[Row, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(row.prompt) for row in self.rows)

    @property
    def answer_tokens(self) -> int:
        return sum(row.answer for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its answer included."""
        return max(len(row.prompt) + row.answer for row in self.rows)


def make(name: str, vocab_size: int, scale: float = 1.0) -> Workload:
    """The workload of that name; `scale` is a share of its rows or groups. UsageError for what cannot be made."""
    if name not in WORKLOADS:
        raise UsageError(f"there is no workload {name!r}; known are {', '.join(WORKLOADS)}")
    if vocab_size <= LEAST_TOKEN:
        raise UsageError(f"a vocabulary of {vocab_size} tokens is too small: workloads draw from id {LEAST_TOKEN} up")
    seed = 101 + WORKLOADS.index(name)
    lines = _MAKERS[name](Random(seed), vocab_size, scale)
    Random(seed + 1).shuffle(lines)
    rows = tuple(Row(title, array(TOKEN, prompt), answer) for title, prompt, answer in lines)
    return Workload(name, scale, vocab_size, rows)


def _count(scale: float, full: int) -> int:
    return max(1, round(full * scale))


def _draw(random: Random, count: int, vocab_size: int) -> list[int]:
    return [random.randrange(LEAST_TOKEN, vocab_size) for _ in range(count)]


def _length(random: Random, mean: float, least: int, most: int) -> int:
    """A lognormal number of that mean and sigma 0.7."""
    sigma = 0.7
    drawn = round(random.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))
    return min(max(drawn, least), most)


def _groups(random: Random, vocab_size: int, groups: int, common: int, shared: int, answer: int) -> Lines:
    """16 rows a group: what all have in common, what the group shares, 64 tokens of the row's own."""
    lines = []
    begin = _draw(random, common, vocab_size)
    for group in range(groups):
        prefix = begin + _draw(random, shared, vocab_size)
        for row in range(16):
            lines.append((f"g{group}r{row}", prefix + _draw(random, 64, vocab_size), answer))
    return lines


def _w1(random: Random, vocab_size: int, scale: float) -> Lines:
    return _groups(random, vocab_size, _count(scale, 8), 0, 1024, 32)


def _w2(random: Random, vocab_size: int, scale: float) -> Lines:
    lines = []
    for row in range(_count(scale, 64)):
        prompt = _draw(random, _length(random, 256, 16, 1536), vocab_size)
        lines.append((f"r{row}", prompt, _length(random, 64, 4, 384)))
    return lines


def _w3(random: Random, vocab_size: int, scale: float) -> Lines:
    return [(f"r{row}", _draw(random, 32, vocab_size), 128) for row in range(_count(scale, 64))]


def _w4(random: Random, vocab_size: int, scale: float) -> Lines:
    return _groups(random, vocab_size, _count(scale, 8), 512, 512, 16)


_MAKERS: dict[str, Callable[[Random, int, float], Lines]] = {"W1": _w1, "W2": _w2, "W3": _w3, "W4": _w4}


# -- as a job would serve them -----------------------------------------------------------------------


class _Source:
    """The rows as a job's input: a line's bytes are its number."""

    def __init__(self, workload: Workload) -> None:
        self.num_lines = len(workload.rows)
        self.fingerprint = f"{workload.name} {workload.scale} {workload.vocab_size}"

    def __iter__(self) -> Iterator[Place]:
        return iter([(number + 1, number, 1) for number in range(self.num_lines)])

    def read(self, offset: int, length: int) -> bytes | None:
        return str(offset).encode()


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A row as a plan sees it: a greedy answer of a length that is known."""

    prompts: tuple[Tokens, ...]
    expect: float
    max_tokens: int
    samples: int = 1
    root: str = ""
    score_from: int = -1
    key: int = 0
    asks: tuple[bytes, ...] = ()
    vector: bool = False
    alone: bool = False

    @property
    def custom_id(self) -> str | None:
        return None


class _Encoder:
    """Looks rows up where a job would encode them."""

    def __init__(self, workload: Workload) -> None:
        self._rows = workload.rows

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[list[_Encoded]]:
        for batch in batches:
            yield [self.parse(raw) for raw in batch]

    def parse(self, raw: bytes | None) -> _Encoded:
        row = self._rows[int(raw or b"0")]
        return _Encoded((row.prompt,), float(row.answer), row.answer)


def plan_requests(workload: Workload, folder: Path) -> tuple[list[Request], int]:
    """(requests in the order and with the known future that a job's plan gives them, prompt tokens of its bound).

    A request's id is its row's name; it is greedy, and nothing but its length ends it. The plan's files go to `folder`.
    """
    plan = build_plan(_Source(workload), _Encoder(workload), folder)
    requests = []
    for unit in plan.units_from():
        row = workload.rows[unit.row]
        future = unit.futures[0] if unit.futures is not None else None
        sampling = Sampling(max_tokens=row.answer)
        requests.append(Request(row.name, unit.tokens, sampling, index=unit.index, future=future))
    return requests, plan.bound
