"""Attention of the compiled kernels: the specification's numbers, and the same bits in any company and any pages.

A type is that of keys and values in their pages; queries and results of int8 pages are bf16.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Heads, Layout, Sequence, deal_pages, layouts, make_sequences, plan_of, reference, run, steps_of

from shoal.kernels import _cpu

TYPES = [torch.float32, torch.bfloat16, torch.int8]
NAMES = _cpu.names()
FP32_BOUND = 2e-5  # times the largest value: rounding of 256 products, and of the exponent of a score up to about 30
BF16_BOUND = 1e-2  # weights and results are rounded to 8 bits
# Weights are rounded to 32767ths of the largest product of a tile, 256 at most, and results to 8 bits.
INT8_BOUND = 2.0**-8 + 256 * 0.5 / 32767
BOUNDS = {torch.float32: FP32_BOUND, torch.bfloat16: BF16_BOUND, torch.int8: INT8_BOUND}


def heads_of(group: int, kv_heads: int, width: int, kept: torch.dtype, window: int = 0, softcap: float = 0.0) -> Heads:
    rounded = kept == torch.int8
    return Heads(group, kv_heads, width, torch.bfloat16 if rounded else kept, window, softcap, rounded)


def bound(heads: Heads) -> float:
    return BOUNDS[torch.int8 if heads.rounded else heads.dtype]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Heads, list[Sequence]]:
    dtype = draw(st.sampled_from(TYPES))
    width = draw(st.sampled_from([8, 16, 20, 24, 31, 32, 64, 80]))
    window = draw(st.sampled_from([0, 0, 1, 5, 33, 250, 300]))
    softcap = draw(st.sampled_from([0.0, 0.0, 3.0, 50.0]))
    heads = heads_of(draw(st.integers(1, 8)), draw(st.integers(1, 2)), width, dtype, window, softcap)
    shapes = []
    for n in range(draw(st.integers(1, 6))):
        own, new = draw(st.integers(1, 400)), draw(st.sampled_from([1, 1, 1, 2, 13, 40]))
        shared = draw(st.sampled_from([0, 48, 256, 300, 512, 768]))
        shapes.append((own, new, draw(st.integers(-1, n - 1)), shared))
    return heads, make_sequences(heads, shapes, draw(st.integers(0, 1000)))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    # torch.equal takes -0 for 0, and NaN for unequal to itself
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


def errors(heads: Heads, sequences: list[Sequence], outs: list[torch.Tensor]) -> float:
    """Largest difference from the specification, in units of the largest value a row could have."""
    pairs = zip(outs, reference(heads, sequences), sequences, strict=True)
    return max(((out.float() - exact).abs().max() / s.values.float().abs().max()).item() for out, exact, s in pairs)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_bits_do_not_depend_on_pages_sharing_chunks_threads_or_company(
    name: str, case: tuple[Heads, list[Sequence]]
) -> None:
    first, *others = layouts()
    expected = run(name, *case, first)
    for layout in others:
        assert same(run(name, *case, layout), expected), layout


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_numbers_are_those_of_the_specification(name: str, case: tuple[Heads, list[Sequence]]) -> None:
    assert errors(*case, run(name, *case, Layout())) < bound(case[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_runs_shared_at_several_depths_fold_like_one_sequence(name: str, dtype: torch.dtype) -> None:
    heads = heads_of(7, 2, 64, dtype)
    shapes = [(1100, 1, -1, 0), (40, 1, 0, 1024), (300, 20, 0, 512), (16, 1, 2, 768), (3, 3, 1, 256), (1, 1, -1, 0)]
    sequences = make_sequences(heads, shapes)
    table, num_pages = deal_pages(sequences, Layout())
    assert plan_of(table, steps_of(sequences, Layout())[0], 32, num_pages, True).num_levels == 4
    shared, own = (run(name, heads, sequences, Layout(share=share)) for share in (True, False))
    assert same(shared, own)
    assert errors(heads, sequences, shared) < bound(heads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("window", [0, 100])
def test_a_prompt_gets_the_same_bits_in_any_chunks(name: str, dtype: torch.dtype, window: int) -> None:
    heads = heads_of(3, 1, 40, dtype, window)
    sequences = make_sequences(heads, [(600, 600, -1, 0)])
    whole = run(name, heads, sequences, Layout())
    for chunk in (599, 256, 100, 17):
        assert same(run(name, heads, sequences, Layout(chunk=chunk, threads=2)), whole), chunk
    assert errors(heads, sequences, whole) < bound(heads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 33, 96, 128, 256])
def test_heads_may_be_of_any_width(name: str, dtype: torch.dtype, width: int) -> None:
    heads = heads_of(2, 2, width, dtype)
    sequences = make_sequences(heads, [(300, 3, -1, 0), (9, 2, 0, 256), (50, 50, -1, 0)])
    outs = run(name, heads, sequences, Layout())
    assert errors(heads, sequences, outs) < bound(heads)
    assert same(run(name, heads, sequences, Layout(page_size=16, share=False)), outs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("group", [12, 13, 48, 50, 97])
def test_groups_may_be_larger_than_a_task(name: str, group: int, dtype: torch.dtype) -> None:
    heads = heads_of(group, 1, 32, dtype)
    sequences = make_sequences(heads, [(300, 3, -1, 0), (9, 2, 0, 256)])
    assert errors(heads, sequences, run(name, heads, sequences, Layout())) < bound(heads)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_rounded_numbers_stay_exact_where_they_are_largest(name: str) -> None:
    """One number alone is mixed into 512 equal ones, in the widest head that may be rounded: sums fill 31 bits. Were
    the sign of a sum lost, the query would see the other half of the positions."""
    heads = heads_of(1, 1, 512, torch.int8)
    values = torch.ones(256, 1, 512, dtype=torch.bfloat16)
    keys = torch.zeros_like(values)
    keys[:, :, 0] = 200
    assert torch.equal(run(name, heads, [Sequence(keys, values, keys[:1])], Layout())[0], values[:1])
    keys[::2], values[::2] = -keys[::2], 0
    query = -keys[:1] / 200
    assert torch.equal(run(name, heads, [Sequence(keys, values, query)], Layout())[0], values[1:2])


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_of_values_that_are_all_zero_dilutes_those_before(name: str) -> None:
    heads = heads_of(1, 1, 32, torch.int8)
    keys, values = (torch.ones(512, 1, 32, dtype=torch.bfloat16) for _ in range(2))
    values[256:] = 0
    out = run(name, heads, [Sequence(keys, values, keys[:1])], Layout())[0]
    assert torch.equal(out, torch.full_like(out, 0.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_whoever_sees_a_rounded_number_that_is_none_gets_none_and_nobody_else_does(
    name: str, which: str, wrong: float
) -> None:
    heads = heads_of(2, 1, 32, torch.int8, window=30)
    (s,) = make_sequences(heads, [(100, 100, -1, 0)])
    (s.keys if which == "key" else s.values)[50, 0, 3] = wrong
    for out in (run(name, heads, [s], Layout())[0], reference(heads, [s])[0]):
        assert out[50:80].isnan().all() and bool(torch.isfinite(out[80:]).all() & torch.isfinite(out[:50]).all())
