"""Jobs to plan in tests, and the rules of planning as slow code that reads like their definition."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import RowError
from shoal.jobs.plan import Plan, build_plan


@dataclass(frozen=True)
class Line:
    """A row of the fake source; `error` makes it a bad one."""

    prompts: tuple[tuple[int, ...], ...]
    samples: int = 1
    expect: float | None = None
    root: str = ""
    score_from: int = -1
    max_tokens: int = 8
    name: str | None = None
    error: str = ""
    asks: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Encoded:
    prompts: list[array[int]]
    samples: int
    expect: float | None
    root: str
    score_from: int
    max_tokens: int
    key: int
    asks: Sequence[bytes]
    vector: bool = False
    alone: bool = False


@dataclass
class FakeSource:
    """Lines as places: line i starts at byte 10 i and is 9 long. The raw text of a line is its number."""

    lines: Sequence[Line]
    fingerprint: str = "source"
    num_lines: int = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for i in range(len(self.lines)):
            self.num_lines = i + 1
            yield i + 1, 10 * i, 9

    def read(self, offset: int, length: int) -> bytes:
        return str(offset // 10).encode()


@dataclass
class FakeEncoder:
    """Tokens are given; a custom_id's key is its length, so that different ids often have the same key."""

    lines: Sequence[Line]
    batches: int = 0

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[list[Encoded | RowError]]:
        ahead: list[list[Encoded | RowError]] = []
        for raws in batches:
            self.batches += 1
            ahead.append([self._encode(self.lines[int(raw or b"")]) for raw in raws])
            if len(ahead) > 1:
                yield ahead.pop(0)
        yield from ahead

    def parse(self, raw: bytes | None) -> FakeRow:
        return FakeRow(self.lines[int(raw or b"")].name)

    def _encode(self, line: Line) -> Encoded | RowError:
        if line.error:
            return RowError(line.error, "bad", "messages")
        prompts = [array("i", prompt) for prompt in line.prompts]
        key = 0 if line.name is None else len(line.name)
        facts = line.samples, line.expect, line.root, line.score_from, line.max_tokens, key
        return Encoded(prompts, *facts, line.asks)


@dataclass
class FakeRow:
    custom_id: str | None


@dataclass(frozen=True)
class Asked:
    """One request in serving order, as a naive reader of the rules sees it."""

    root: str
    tokens: tuple[int, ...]  # that must be computed
    prompt: tuple[int, ...]
    reach: int


def plan_of(lines: Sequence[Line], folder: Path, order: str = "prefix") -> Plan:
    return build_plan(FakeSource(lines), FakeEncoder(lines), folder, order)  # type: ignore[arg-type]


def asked(lines: Sequence[Line], plan: Plan) -> list[Asked]:
    """Requests in the plan's serving order."""
    found = []
    for unit in plan.units_from():
        line = lines[unit.row]
        prompt = line.prompts[unit.prompt]
        goal = prompt if line.max_tokens else prompt[:-1]
        for sample in range(unit.samples):
            limit = line.score_from - 1 if line.score_from >= 1 and sample == 0 else len(prompt)
            found.append(Asked(line.root, goal, prompt, limit))
    return found


def common(one: Asked, other: Asked) -> int:
    if one.root != other.root:
        return 0
    same = 0
    for a, b in zip(one.tokens, other.tokens, strict=False):
        if a != b:
            break
        same += 1
    return same


def trie_bound(requests: Sequence[Asked]) -> int:
    """Every node is computed once, or once by everybody who may not take it from others."""
    nodes: dict[tuple[str, tuple[int, ...]], int] = {}
    for request in requests:
        for depth in range(1, len(request.tokens) + 1):
            node = request.root, request.tokens[:depth]
            nodes[node] = nodes.get(node, 0) + (depth > request.reach)
    return sum(max(1, forced) for forced in nodes.values())


def computed_in_order(requests: Sequence[Asked]) -> int:
    """Prompt tokens computed with room for everything, serving `requests` one after the other."""
    total = 0
    for i, request in enumerate(requests):
        held = max((common(request, earlier) for earlier in requests[:i]), default=0)
        total += len(request.tokens) - min(held, request.reach, len(request.tokens))
    return total


def future_of(requests: Sequence[Asked], i: int) -> tuple[tuple[int, int], ...]:
    """The staircase by definition; a request whose goal is all its prompt offers all of it."""
    needed: dict[int, int] = {}
    for j in range(len(requests) - 1, i, -1):
        for depth in range(1, min(common(requests[i], requests[j]), requests[j].reach) + 1):
            needed[depth] = j
    steps: list[tuple[int, int]] = []
    for depth in sorted(needed, reverse=True):
        if not steps or needed[depth] != steps[-1][1]:
            steps.append((depth, needed[depth]))
    return tuple(steps)


def random_lines(rng: random.Random, n: int, scored: bool = False) -> list[Line]:
    """A hierarchical set: stems, stems of stems, prefixes of others, identical prompts, roots, samples."""
    stems = [tuple(rng.randrange(4) for _ in range(rng.randrange(1, 40))) for _ in range(3)]
    stems += [rng.choice(stems) + tuple(rng.randrange(4) for _ in range(rng.randrange(1, 30))) for _ in range(4)]
    lines = []
    for _ in range(n):
        prompts = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            stem = rng.choice(stems)
            cut = rng.choice([len(stem), rng.randrange(1, len(stem) + 1)])
            prompts.append(stem[:cut] + tuple(rng.randrange(4) for _ in range(rng.choice([0, 0, 1, 5]))))
        lines.append(
            Line(
                tuple(prompts),
                samples=rng.choice([1, 1, 2, 4]),
                expect=rng.choice([None, 1.0, 16.0, 300.0]),
                root=rng.choice(["", "", "\0salt", "adapter"]),
                score_from=rng.choice([-1, 1, rng.randrange(1, 30)]) if scored else -1,
                max_tokens=rng.choice([0, 8]) if scored else 8,
            )
        )
    return lines
