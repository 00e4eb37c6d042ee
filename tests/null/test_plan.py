"""The plan of a job: its order meets the size of the trie, and its future is what comes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from plan_jobs import Line, asked, computed_in_order, future_of, plan_of, random_lines, trie_bound

from shoal.jobs.plan import Unit


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


def test_a_unit_is_plain_data(tmp_path: Path) -> None:
    unit = plan_of([Line(((1, 2),), samples=2)], tmp_path).unit(0)
    assert unit == Unit(0, 0, 0, 0, array("i", [1, 2]), 2, (((2, 1),), ()))
