"""Attention of the compiled kernels: the specification's numbers, and the same bits in any company and any pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Heads, Layout, Sequence, deal_pages, layouts, make_sequences, plan_of, reference, run, steps_of

from shoal.kernels import _cpu

TYPES = [torch.float32, torch.bfloat16]
NAMES = _cpu.names()
FP32_BOUND = 2e-5  # times the largest value: rounding of 256 products, and of the exponent of a score up to about 30
BF16_BOUND = 1e-2  # weights and results are rounded to 8 bits


@st.composite
def cases(draw: st.DrawFn) -> tuple[Heads, list[Sequence]]:
    dtype = draw(st.sampled_from(TYPES))
    width = draw(st.sampled_from([8, 16, 20, 24, 31, 32, 64, 80]))
    window = draw(st.sampled_from([0, 0, 1, 5, 33, 250, 300]))
    softcap = draw(st.sampled_from([0.0, 0.0, 3.0, 50.0]))
    heads = Heads(draw(st.integers(1, 8)), draw(st.integers(1, 2)), width, dtype, window, softcap)
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
    bound = FP32_BOUND if case[0].dtype == torch.float32 else BF16_BOUND
    assert errors(*case, run(name, *case, Layout())) < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_runs_shared_at_several_depths_fold_like_one_sequence(name: str, dtype: torch.dtype) -> None:
    heads = Heads(7, 2, 64, dtype)
    shapes = [(1100, 1, -1, 0), (40, 1, 0, 1024), (300, 20, 0, 512), (16, 1, 2, 768), (3, 3, 1, 256), (1, 1, -1, 0)]
    sequences = make_sequences(heads, shapes)
    table, num_pages = deal_pages(sequences, Layout())
    assert plan_of(table, steps_of(sequences, Layout())[0], 32, num_pages, True).num_levels == 4
    shared, own = (run(name, heads, sequences, Layout(share=share)) for share in (True, False))
    assert same(shared, own)
    assert errors(heads, sequences, shared) < (FP32_BOUND if dtype == torch.float32 else BF16_BOUND)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("window", [0, 100])
def test_a_prompt_gets_the_same_bits_in_any_chunks(name: str, dtype: torch.dtype, window: int) -> None:
    heads = Heads(3, 1, 40, dtype, window)
    sequences = make_sequences(heads, [(600, 600, -1, 0)])
    whole = run(name, heads, sequences, Layout())
    for chunk in (599, 256, 100, 17):
        assert same(run(name, heads, sequences, Layout(chunk=chunk, threads=2)), whole), chunk
    assert errors(heads, sequences, whole) < (FP32_BOUND if dtype == torch.float32 else BF16_BOUND)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 33, 96, 128, 256])
def test_heads_may_be_of_any_width(name: str, dtype: torch.dtype, width: int) -> None:
    heads = Heads(2, 2, width, dtype)
    sequences = make_sequences(heads, [(300, 3, -1, 0), (9, 2, 0, 256), (50, 50, -1, 0)])
    outs = run(name, heads, sequences, Layout())
    assert errors(heads, sequences, outs) < (FP32_BOUND if dtype == torch.float32 else BF16_BOUND)
    assert same(run(name, heads, sequences, Layout(page_size=16, share=False)), outs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [12, 13, 48, 50, 97])
def test_groups_may_be_larger_than_a_task(name: str, group: int) -> None:
    heads = Heads(group, 1, 32, torch.float32)
    sequences = make_sequences(heads, [(300, 3, -1, 0), (9, 2, 0, 256)])
    assert errors(heads, sequences, run(name, heads, sequences, Layout())) < FP32_BOUND
