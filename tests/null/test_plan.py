"""The plan of a job: its order meets the size of the trie, its future is what comes, a damaged one is made again."""

from __future__ import annotations

import json
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.errors import RowError, StateError
from shoal.jobs.arena import PAD
from shoal.jobs.plan import Plan, Unit, build_plan
from shoal.jobs.plan_future import staircases
from shoal.jobs.plan_order import NO_LIMIT, build_tree
from shoal.jobs.plan_sort import Prompts, overlaps, sort_prompts
from shoal.jobs.plan_store import ARENA, ARRAYS, ERRORS, SUMMARY


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


@dataclass(frozen=True)
class Encoded:
    prompts: list[array[int]]
    samples: int
    expect: float | None
    root: str
    score_from: int
    max_tokens: int
    key: int


@dataclass
class FakeSource:
    """Lines as places: line i starts at byte 10 i and is 9 long. The raw text of a line is its number."""

    lines: Sequence[Line]
    fingerprint: str = "source"
    num_lines: int = 0
    reads: int = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for i in range(len(self.lines)):
            self.num_lines = i + 1
            yield i + 1, 10 * i, 9

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return str(offset // 10).encode()


@dataclass
class FakeEncoder:
    """Tokens are given; a custom_id's key is its length, so that different ids often have the same key."""

    lines: Sequence[Line]
    batches: int = 0
    names: list[str | None] = field(default_factory=list)

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
        return Encoded(prompts, line.samples, line.expect, line.root, line.score_from, line.max_tokens, key)


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


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_the_bound_is_the_size_of_the_trie_and_the_order_meets_it(tmp_path: Path, seed: int, scored: bool) -> None:
    rng = random.Random(seed)
    lines = random_lines(rng, rng.randrange(1, 40), scored)
    plan = plan_of(lines, tmp_path)
    requests = asked(lines, plan)
    assert plan.bound == trie_bound(requests) == computed_in_order(requests)
    assert plan.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert plan.num_requests == len(requests)
    assert plan_of(lines, tmp_path / "input", "input").bound == plan.bound


def test_no_order_computes_less_than_the_bound(tmp_path: Path) -> None:
    rng = random.Random(5)
    for trial in range(12):
        lines = random_lines(rng, 3, scored=True)
        plan = plan_of(lines, tmp_path / str(trial))
        requests = asked(lines, plan)[:6]
        assert trie_bound(requests) == min(computed_in_order(order) for order in permutations(requests))


@pytest.mark.parametrize("order", ["prefix", "input"])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_known_future_is_what_comes(tmp_path: Path, seed: int, scored: bool, order: str) -> None:
    rng = random.Random(100 + seed)
    lines = random_lines(rng, rng.randrange(1, 25), scored)
    plan = plan_of(lines, tmp_path, order)
    requests = asked(lines, plan)
    expected = [future_of(requests, i) for i in range(len(requests))]
    assert [plan.future(i) for i in range(plan.num_requests)] == expected
    assert [future for unit in plan.units_from() for future in unit.futures] == expected


@pytest.mark.parametrize("order", ["prefix", "input"])
def test_every_prompt_is_served_once_with_its_own_tokens(tmp_path: Path, order: str) -> None:
    lines = random_lines(random.Random(7), 300)
    plan = plan_of(lines, tmp_path, order)
    units = list(plan.units_from())
    assert sorted((u.row, u.prompt) for u in units) == [
        (i, k) for i, x in enumerate(lines) for k in range(len(x.prompts))
    ]
    assert all(tuple(u.tokens) == lines[u.row].prompts[u.prompt] for u in units)
    assert [u.position for u in units] == list(range(plan.num_units))
    index = 0
    for unit in units:
        assert unit.index == index and len(unit.futures) == unit.samples == lines[unit.row].samples
        index += unit.samples
    if order == "input":
        assert [(u.row, u.prompt) for u in units] == sorted((u.row, u.prompt) for u in units)


def test_feeding_starts_anywhere_and_skips_rows(tmp_path: Path) -> None:
    lines = random_lines(random.Random(8), 50)
    plan = plan_of(lines, tmp_path)
    units = list(plan.units_from())
    assert list(plan.units_from(17)) == units[17:]
    assert plan.unit(23) == units[23]
    assert list(plan.units_from(5, lambda row: row % 3 == 0)) == [u for u in units[5:] if u.row % 3 == 0]


def served_rows(lines: Sequence[Line], folder: Path) -> list[int]:
    return [unit.row for unit in plan_of(lines, folder).units_from()]


def test_groups_that_decode_more_for_each_prompt_token_go_first(tmp_path: Path) -> None:
    long, short = tuple(range(100, 150)), tuple(range(200, 210))
    lines = [
        Line(((*long, 1),), expect=10.0),  # 20 decoded for 52 tokens computed
        Line(((*short, 1),), expect=10.0),  # 20 for 12
        Line(((*long, 2),), expect=10.0),
        Line(((*short, 2),), expect=10.0),
        Line(((7, 8),), expect=1.0),  # 1 for 2, alone
    ]
    assert served_rows(lines, tmp_path) == [1, 3, 4, 0, 2]


def test_the_shared_prefix_of_a_group_counts_once(tmp_path: Path) -> None:
    shared = tuple(range(90))
    lines = [Line(((500 + i, *range(19)),), expect=20.0) for i in range(2)]  # 20 for 20 each
    lines += [Line(((*shared, 100 + i),), expect=20.0) for i in range(10)]  # 200 for 100 together
    assert served_rows(lines, tmp_path)[:10] == list(range(2, 12))


def test_samples_count_as_decoding(tmp_path: Path) -> None:
    lines = [Line(((1, 2, 3),), expect=5.0), Line(((4, 5, 6),), expect=3.0, samples=4)]
    assert served_rows(lines, tmp_path) == [1, 0]


def test_unknown_lengths_leave_file_order_between_groups(tmp_path: Path) -> None:
    lines = [Line(((group, 1, own),)) for own in range(3) for group in (5, 3, 9)]
    assert served_rows(lines, tmp_path) == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_an_unknown_length_counts_as_the_average_of_the_known(tmp_path: Path) -> None:
    lines = [Line(((1, 1),), expect=10.0), Line(((2, 2),)), Line(((3, 3),), expect=30.0)]
    assert served_rows(lines, tmp_path) == [2, 1, 0]


def test_a_row_that_must_compute_a_prefix_goes_before_those_that_take_it(tmp_path: Path) -> None:
    stem = tuple(range(50))
    lines = [Line(((*stem, 90 + i),), expect=100.0) for i in range(3)]
    lines += [Line(((*stem, 99),), expect=1.0, score_from=1)]
    plan = plan_of(lines, tmp_path)
    assert next(plan.units_from()).row == 3
    assert plan.bound == 50 + 4


def test_every_full_echo_computes_its_own_prompt(tmp_path: Path) -> None:
    lines = [Line(((1, 2, 3, 4),), score_from=1, samples=3), Line(((1, 2, 3, 4),), score_from=1)]
    assert plan_of(lines, tmp_path).bound == 8


def test_identical_prompts_and_samples_recompute_only_their_last_token(tmp_path: Path) -> None:
    lines = [Line(((1, 2, 3),), samples=3), Line(((1, 2, 3),)), Line(((1, 2, 3, 4),)), Line(((1, 2),))]
    plan = plan_of(lines, tmp_path)
    assert (plan.bound, plan.prompt_tokens, plan.saved) == (4, 18, 14)
    assert plan.last_again == 3  # the shorter prompt goes first, the longest computes its own last token anyway


def test_rows_with_different_roots_share_nothing(tmp_path: Path) -> None:
    lines = [Line(((1, 2, 3),), root=root) for root in ("", "a", "\0s", "a")]
    plan = plan_of(lines, tmp_path)
    assert plan.bound == 9
    assert [plan.future(i) for i in range(4)].count(()) == 3


def test_bad_rows_are_rows_without_units(tmp_path: Path) -> None:
    lines = [
        Line(((1, 2),)),
        Line((), error="no model of that name: use another"),
        Line(((3,),)),
        Line((), error="é" * 99),
    ]
    plan = plan_of(lines, tmp_path)
    assert (plan.num_lines, plan.num_rows, plan.num_bad, plan.num_units) == (4, 4, 2, 2)
    bad = list(plan.bad_rows())
    assert [(number, row.line, str(row.error)) for number, row in bad] == [
        (1, 2, lines[1].error),
        (3, 4, lines[3].error),
    ]
    assert bad[0][1].error is not None and (bad[0][1].error.code, bad[0][1].error.param) == ("bad", "messages")
    assert plan.row(2).error is None and (plan.row(2).offset, plan.row(2).length, plan.row(2).prompts) == (20, 9, 1)


def test_second_uses_of_a_custom_id_are_errors_and_equal_hashes_are_not(tmp_path: Path) -> None:
    names = ["a", "b", "a", None, "cc", "a", "dd", "b"]  # all of one length have one key
    lines = [Line(((i, 1),), name=name) for i, name in enumerate(names)]
    plan = plan_of(lines, tmp_path)
    bad = {number: row.error for number, row in plan.bad_rows()}
    assert {number: str(error).split(":")[0][-6:] for number, error in bad.items()} == {
        2: "line 1",
        5: "line 1",
        7: "line 2",
    }
    assert all(error is not None and error.code == "duplicate_custom_id" for error in bad.values())
    assert sorted(unit.row for unit in plan.units_from()) == [0, 1, 3, 4, 6]
    assert plan.bound == 10


@pytest.mark.parametrize("order", ["prefix", "input"])
@pytest.mark.parametrize("lines", [[], [Line((), error="bad")]])
def test_a_job_without_work_has_a_plan(tmp_path: Path, lines: list[Line], order: str) -> None:
    plan = plan_of(lines, tmp_path, order)
    assert (plan.num_units, plan.bound, plan.prompt_tokens, plan.num_rows) == (0, 0, 0, len(lines))
    assert list(plan.units_from()) == [] and plan.largest_prefixes() == []
    with pytest.raises(IndexError):
        plan.future(0)


def test_the_largest_prefixes_are_those_whose_own_part_saves_most(tmp_path: Path) -> None:
    system, task = tuple(range(30)), tuple(range(100, 120))
    lines = [Line(((*system, *task, 200 + i),)) for i in range(5)] + [Line(((*system, 300 + i),)) for i in range(5)]
    plan = plan_of(lines, tmp_path)
    (depth, uses, unit), second = plan.largest_prefixes(2)
    assert (depth, uses, tuple(plan.unit_tokens(unit)[:depth])) == (30, 10, system)
    assert second[:2] == (50, 5)


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    lines = random_lines(random.Random(9), 20)
    source, encoder = FakeSource(lines), FakeEncoder(lines)
    first = list(build_plan(source, encoder, tmp_path, key="k").units_from())
    assert list(build_plan(source, encoder, tmp_path, key="k").units_from()) == first and encoder.batches == 1
    assert list(Plan.load(tmp_path).units_from()) == first
    build_plan(source, encoder, tmp_path, key="other")
    build_plan(FakeSource(lines, "changed"), encoder, tmp_path, key="other")
    build_plan(FakeSource(lines, "changed"), encoder, tmp_path, "input", key="other")
    assert encoder.batches == 4


def test_a_half_made_plan_is_made_again(tmp_path: Path) -> None:
    lines = random_lines(random.Random(10), 20)
    first = list(plan_of(lines, tmp_path).units_from())
    (tmp_path / SUMMARY).unlink()
    (tmp_path / ARENA).write_bytes(b"half")
    with pytest.raises(StateError, match="no finished plan"):
        Plan.load(tmp_path)
    assert list(plan_of(lines, tmp_path).units_from()) == first


@pytest.mark.parametrize("name", [ARENA, ERRORS, *(f"{name}.npy" for name in ARRAYS), SUMMARY])
def test_a_damaged_plan_is_refused_and_made_again(tmp_path: Path, name: str) -> None:
    lines = [*random_lines(random.Random(11), 20), Line((), error="bad")]
    first = list(plan_of(lines, tmp_path).units_from())
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StateError, match=name):
        Plan.load(tmp_path)
    assert list(plan_of(lines, tmp_path).units_from()) == first


def test_a_plan_of_another_format_is_made_again(tmp_path: Path) -> None:
    lines = random_lines(random.Random(12), 5)
    plan_of(lines, tmp_path)
    summary = json.loads((tmp_path / SUMMARY).read_text())
    (tmp_path / SUMMARY).write_text(json.dumps({**summary, "format": -1}))
    encoder = FakeEncoder(lines)
    build_plan(FakeSource(lines), encoder, tmp_path)
    assert encoder.batches == 1


def test_progress_is_told_in_rows_and_bytes(tmp_path: Path) -> None:
    lines = [Line(((i,),)) for i in range(5000)]
    told: list[tuple[int, int]] = []
    encoder = FakeEncoder(lines)
    build_plan(FakeSource(lines), encoder, tmp_path, progress=lambda rows, size: told.append((rows, size)))
    assert told[-1] == (5000, 49_999) and told == sorted(told) and len(told) == encoder.batches > 1


def prompts_of(sequences: Sequence[Sequence[int]], roots: Sequence[int]) -> Prompts:
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    flat = [token for sequence in sequences for token in sequence]
    padded = np.array(flat + [-1] * PAD, dtype=np.int32)
    return Prompts(padded, np.cumsum(lengths) - lengths, lengths, np.array(roots, dtype=np.int64))


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.sampled_from([0, 1, 2, 2**21 - 3]), max_size=40)), max_size=20
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SEQUENCES)
def test_sorting_is_lexicographic_by_root_and_stable(pairs: list[tuple[int, list[int]]]) -> None:
    prompts = prompts_of([tokens for _, tokens in pairs], [root for root, _ in pairs])
    order = sort_prompts(prompts)
    assert order.tolist() == sorted(range(len(pairs)), key=lambda i: (pairs[i][0], pairs[i][1], i))
    for i, j, overlap in zip(order, order[1:], overlaps(prompts, order[:-1], order[1:]), strict=False):
        one, other = (Asked(str(root), tuple(tokens), (), 0) for root, tokens in (pairs[i], pairs[j]))
        assert overlap == common(one, other)


def test_long_shared_prefixes_cost_no_more_than_their_tokens() -> None:
    """4,000 prompts behind 10 prefixes of 4,000 tokens, 16 million in all: sorted by windows, not one by one."""
    rng = np.random.default_rng(3)
    stems, n = rng.integers(0, 100_000, (10, 4000), dtype=np.int32), 4_000
    tokens = np.concatenate([stems[rng.integers(0, 10, n)], rng.integers(0, 100_000, (n, 4), dtype=np.int32)], axis=1)
    lengths = np.full(n, 4004, dtype=np.int64)
    padded = np.concatenate([tokens.ravel(), np.full(PAD, -1, dtype=np.int32)])
    prompts = Prompts(padded, np.arange(n) * 4004, lengths, np.zeros(n, dtype=np.int64))
    started = time.process_time()
    order = sort_prompts(prompts)
    shared = overlaps(prompts, order[:-1], order[1:])
    assert time.process_time() - started < 5.0  # a tenth of this on a quiet machine
    assert (shared >= 4000).sum() == n - 10
    assert order.tolist() == np.lexsort(tokens[:, [4003, 4002, 4001, 4000, 1, 0]].T).tolist()


def test_a_long_chain_of_prefixes_costs_no_more_than_n_log_n() -> None:
    """Prompt i is the first i + 1 tokens of one text, served in random order: every path is as deep as can be."""
    n = 30_000
    rng = np.random.default_rng(4)
    started = time.process_time()
    tree = build_tree(np.arange(n, dtype=np.int64))
    served = rng.permutation(n)
    found = staircases(tree, served, np.arange(n), np.full(n, NO_LIMIT))
    assert time.process_time() - started < 5.0
    for p in (0, 17, n // 2, n - 30):
        expected: list[tuple[int, int]] = []
        reached = 0
        for later in range(p + 1, n):  # the nearest first: each step must reach deeper than those before it
            depth = int(min(served[p], served[later])) + 1
            if depth > reached:
                expected.append((depth, later))
                reached = depth
        steps = slice(found.start[p], found.start[p + 1])
        assert list(zip(found.depth[steps], found.index[steps], strict=True)) == expected[::-1]


def test_a_unit_is_plain_data(tmp_path: Path) -> None:
    unit = plan_of([Line(((1, 2),), samples=2)], tmp_path).unit(0)
    assert unit == Unit(0, 0, 0, 0, array("i", [1, 2]), 2, (((2, 1),), ()))
