"""Draws and scores: every instruction set finds what the specification finds, to the last bit, in any company."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import Draws, load, set_threads
from shoal.kernels.cpu import CpuKernels, instruction_sets
from shoal.kernels.ref_sampling import exponential

REF = load("ref")
SETS = [CpuKernels(name) for name in instruction_sets()]


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws_of(x: Tensor, wishes: list[tuple[float, int, float, float]], seed: int = 0) -> Draws:
    """One draw of each row with each wish: (heat, top_k, top_p, min_p)."""
    pairs = [(row, wish) for row in range(len(x)) for wish in wishes]
    row = torch.tensor([row for row, _ in pairs])
    heat, top_k, top_p, min_p = zip(*(wish for _, wish in pairs), strict=True)
    high = torch.randint(-(2**63), 2**63 - 1, (len(pairs),), generator=torch.Generator().manual_seed(seed))
    return Draws(
        row, high, x.max(1).values[row], torch.tensor(heat), torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64), torch.tensor(min_p),
    )  # fmt: skip


def part_of(draws: Draws, which: slice) -> Draws:
    return Draws(*(getattr(draws, field.name)[which].contiguous() for field in dataclasses.fields(draws)))


ROWS = st.one_of(
    st.lists(st.sampled_from([-math.inf, -30.0, -3.0, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=80),
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=80),
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=20),
)
WISHES = st.tuples(
    st.sampled_from([1.0, 0.7, 1.9, 1e-3, 100.0]),
    st.sampled_from([0, 1, 2, 5, 40, 1000]),
    st.sampled_from([1.0, 0.999999, 0.9, 0.5, 1e-9]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


@given(row=ROWS, wishes=st.lists(WISHES, min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_every_set_draws_what_the_specification_draws(
    row: list[float], wishes: list[tuple[float, int, float, float]], seed: int
) -> None:
    x = torch.tensor([row])
    if not x.max().isfinite():
        x[0, 0] = 1.0
    draws = draws_of(x, wishes, seed)
    expected = REF.draw(x, draws)
    for kernels in SETS:
        assert torch.equal(kernels.draw(x, draws), expected), kernels.name


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.7, 3.0, 12.0])
@pytest.mark.parametrize("columns", [2048, 2049, 40_001])
def test_flat_and_steep_rows_of_many_tokens_are_drawn_alike(columns: int, spread: float) -> None:
    x = noise(3, columns, seed=columns) * spread
    x[1] = (x[1] * 2).round() / 2  # many equals
    tops = (0, 1, 50, 3000, columns - 1)
    wishes = [(heat, k, p, m) for heat in (0.6, 1.0) for k in tops for p in (1.0, 0.9, 0.2) for m in (0.0, 0.05)]
    draws = draws_of(x, wishes)
    expected = REF.draw(x, draws)
    for kernels in SETS:
        assert torch.equal(kernels.draw(x, draws), expected), kernels.name


def test_a_draw_depends_on_its_row_alone() -> None:
    x = noise(40, 5003, seed=5) * 3
    draws = draws_of(x, [(0.8, 0, 1.0, 0.0), (0.8, 20, 0.9, 0.01)])
    for kernels in SETS:
        set_threads(1)
        expected = kernels.draw(x, draws)
        set_threads(2)
        assert torch.equal(kernels.draw(x, draws), expected)
        for which in (slice(0, 1), slice(7, 30), slice(79, 80), slice(0, 0)):
            assert torch.equal(kernels.draw(x, part_of(draws, which)), expected[which])


def test_places_reach_from_the_first_token_to_the_last() -> None:
    x = torch.tensor([[0.0, -math.inf, 0.0, 0.0]])
    for number, token in ((0, 0), (-1, 3), (2**63 - 1, 2), (-(2**63), 2), (2**64 // 3, 0), (2**64 // 3 + 1, 2)):
        draws = dataclasses.replace(draws_of(x, [(1.0, 0, 1.0, 0.0)]), number_S=torch.tensor([number]))
        for kernels in (REF, *SETS):
            assert kernels.draw(x, draws).tolist() == [token]


# -- scores -------------------------------------------------------------------------------------------


def same_scores(x: Tensor, rows: list[int], tokens: list[int], top: int) -> None:
    where = torch.tensor(rows, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
    expected = REF.score(x, *where, top)
    for kernels in SETS:
        for threads in (1, 2):
            set_threads(threads)
            found = kernels.score(x, *where, top)
            for field in dataclasses.fields(expected):
                assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), (kernels.name, field)


@given(row=ROWS, top=st.integers(0, 80), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_set_scores_as_the_specification_does(row: list[float], top: int, data: st.DataObject) -> None:
    x = torch.tensor([row])
    if not x.max().isfinite():
        x[0, 0] = 1.0
    token = data.draw(st.integers(0, len(row) - 1))
    same_scores(x, [0], [token], min(top, len(row)))


@pytest.mark.parametrize("columns", [2047, 4096, 40_001])
def test_long_rows_are_scored_alike(columns: int) -> None:
    x = noise(4, columns, seed=1) * 3
    x[1] = x[1].round()
    x[2] = torch.arange(columns)  # each number better than all before
    rows, tokens = [0, 0, 1, 1, 2, 3, 3], [0, columns - 1, 5, 2046, 17, 2046, 100]
    for top in (0, 1, 20, 300):
        same_scores(x, rows, tokens, top)


def test_a_row_that_is_no_distribution_is_no_error() -> None:
    for odd in (math.nan, math.inf):
        x = noise(2, 300)
        x[0, 7] = odd
        for kernels in (REF, *SETS):
            found = kernels.score(x, torch.tensor([0, 1]), torch.tensor([7, 7]), 5)
            assert not found.best_S[0].isfinite() and found.best_S[1] == x[1].max()
            assert ((found.top_id_SK >= 0) & (found.top_id_SK < 300)).all()


def test_a_weight_is_a_power_of_e() -> None:
    z = torch.cat([-torch.rand(100_000, generator=torch.Generator().manual_seed(2)) * 28, torch.tensor([0.0, -28.0])])
    x = torch.stack([torch.zeros_like(z), z], 1)
    truth = torch.exp(z.double())
    assert ((exponential(z).double() / truth - 1).abs() < 1.2e-7).all()
    every, first = torch.arange(len(z)), torch.zeros(len(z), dtype=torch.int64)
    for kernels in (REF, *SETS):
        weight = kernels.score(x, every, first, 0).weight_S - 2**40
        assert ((weight - truth * 2**40).abs() <= 1.2e-7 * truth * 2**40 + 1).all()
        assert weight[z == 0].eq(2**40).all() and weight[z == -28].eq(0).all()
