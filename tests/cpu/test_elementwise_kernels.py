"""The kernels that go number by number or row by row: right to the last bit but one, and the same bits in company."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import _cpu, set_threads
from shoal.kernels.cpu import CpuKernels
from shoal.kernels.ref import RefKernels

DTYPES = [torch.float32, torch.bfloat16]
COLUMNS = st.one_of(st.integers(1, 200), st.sampled_from([255, 256, 257, 896, 1000, 2048, 2049, 4097]))


@pytest.fixture(params=_cpu.names())
def table(request: pytest.FixtureRequest) -> _cpu.Table:
    return _cpu.Table(request.param)


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_threads(before)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fenced(x: Tensor) -> Tensor:
    """A copy that begins at an odd place, behind NaNs that must not leak in nor be overwritten. Every second one has
    such a fence at its end too, the others end with their memory (`make sanitize` sees what goes beyond)."""
    room = torch.full((7 + x.numel() + x.numel() % 2 * 40,), math.nan, dtype=x.dtype)
    inner = room[7 : 7 + x.numel()].view(x.shape)
    return inner.copy_(x)


def rms_norm(table: _cpu.Table, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    x, y = fenced(x), fenced(torch.empty_like(x))
    rows, columns = x.shape
    weight = fenced(weight)
    table.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, columns, eps, x.dtype == torch.float32)
    fence = y._base
    assert fence is not None and fence[:7].isnan().all() and fence[7 + y.numel() :].isnan().all()
    return y.contiguous().clone()


def add(table: _cpu.Table, x: Tensor, branch: Tensor, factor: float) -> Tensor:
    y = fenced(torch.empty_like(x))
    x, branch = fenced(x), fenced(branch)
    table.add(x.data_ptr(), branch.data_ptr(), factor, y.data_ptr(), x.numel(), x.dtype == torch.float32)
    fence = y._base
    assert fence is not None and fence[:7].isnan().all() and fence[7 + y.numel() :].isnan().all()
    return y.clone()


def largest(table: _cpu.Table, x: Tensor) -> tuple[list[int], Tensor]:
    x = fenced(x)
    index, value = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
    table.largest(x.data_ptr(), index.data_ptr(), value.data_ptr(), *x.shape)
    return index.tolist(), value


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    return torch.equal(a.view(kind), b.view(kind))


# -- norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 5), columns=COLUMNS, seed=st.integers(0, 9), scale=st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=60, deadline=None)
def test_a_norm_is_that_of_float64_rounded_once(
    dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float
) -> None:
    x, weight = (noise(rows, columns, seed=seed) * scale).to(dtype), noise(columns, seed=seed + 100)
    wide = x.double()
    truth = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    step = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8 * 1.0001}[dtype]  # bf16: half a unit in the last place
    for name in _cpu.names():
        y = rms_norm(_cpu.Table(name), x, weight)
        assert ((y.double() - truth).abs() <= step * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 64, 100, 896, 2816])
def test_a_norm_does_not_depend_on_company(table: _cpu.Table, columns: int, dtype: torch.dtype) -> None:
    x, weight = noise(150, columns, seed=3, dtype=dtype), noise(columns, seed=4)
    set_threads(1)
    whole = rms_norm(table, x, weight)
    for threads in (1, 2):
        set_threads(threads)
        assert same_bits(rms_norm(table, x, weight), whole)
        for first, last in ((0, 1), (3, 20), (149, 150), (7, 150)):
            assert same_bits(rms_norm(table, x[first:last], weight), whole[first:last])
    same = x.clone()  # and in place
    table.rms_norm(same.data_ptr(), weight.data_ptr(), same.data_ptr(), *x.shape, 1e-6, dtype == torch.float32)
    assert same_bits(same, whole)


# -- residual sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(count=COLUMNS, seed=st.integers(0, 9), factor=st.sampled_from([1.0, 0.22, -3.0]))
@settings(max_examples=60, deadline=None)
def test_a_residual_sum_is_rounded_once(dtype: torch.dtype, count: int, seed: int, factor: float) -> None:
    x, branch = noise(count, seed=seed, dtype=dtype), noise(count, seed=seed + 100, dtype=dtype)
    exact = x.double() + branch.double() * float(torch.tensor(factor))
    for name in _cpu.names():
        y = add(_cpu.Table(name), x, branch, factor)
        # the scalar set has no fused multiply-add: it rounds the product to float before
        limit = exact.abs() * {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8 * 1.0001}[dtype]
        assert ((y.double() - exact).abs() <= limit + (branch.double() * factor).abs() * 2.0**-23).all()
        if factor == 1:
            assert same_bits(y, x + branch)


def test_a_residual_sum_does_not_depend_on_its_length(table: _cpu.Table) -> None:
    x, branch = noise(200_003, dtype=torch.bfloat16), noise(200_003, seed=1, dtype=torch.bfloat16)
    set_threads(1)
    whole = add(table, x, branch, 0.7)
    set_threads(2)
    assert same_bits(add(table, x, branch, 0.7), whole)
    for first, last in ((0, 1), (5, 33), (100_000, 200_003), (200_002, 200_003)):
        assert same_bits(add(table, x[first:last], branch[first:last], 0.7), whole[first:last])


# -- largest ------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.5, 3.0, math.inf, math.nan]), min_size=1),
    before=st.sampled_from([0, 1, 15, 2047, 2048, 5000]),
    after=st.integers(0, 70),
)
@settings(max_examples=300, deadline=None)
def test_the_largest_is_the_first_of_equals_and_a_nan_is_larger_than_any_number(
    values: list[float], before: int, after: int
) -> None:
    x = torch.tensor([[-math.inf] * before + values + [-math.inf] * after])
    numbers = x[0].tolist()
    odd = next((i for i, v in enumerate(numbers) if math.isnan(v)), None)
    expected = odd if odd is not None else numbers.index(max(numbers))
    for name in _cpu.names():
        index, value = largest(_cpu.Table(name), x)
        assert index == [expected]
        assert same_bits(value, x[0, expected : expected + 1].contiguous())


@pytest.mark.parametrize("columns", [1, 17, 2048, 2049, 151_936, 262_144])
def test_the_largest_of_many_rows_is_that_of_torch_with_any_number_of_threads(table: _cpu.Table, columns: int) -> None:
    x = noise(9, columns, seed=columns)
    x[4] = -math.inf
    for threads in (1, 2):
        set_threads(threads)
        index, value = largest(table, x)
        assert index == x.argmax(1).tolist()
        assert torch.equal(value, x.max(1).values)
    assert largest(table, x[:0])[0] == []


# -- forbid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 1000, 4096, 151_936])
def test_what_is_forbidden_is_minus_infinity_and_nothing_else_changes(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    before = noise(5, columns, seed=columns)
    rows = torch.tensor([3, 0, 4])
    bits = torch.randint(-(2**31), 2**31, (3, (columns + 31) // 32), generator=generator).to(torch.int32)
    bits[0, -1], bits[1, 0] = -1, 0
    expected = before.clone()
    for row, mask in zip(rows.tolist(), bits.tolist(), strict=True):
        for token in range(columns):
            if not mask[token // 32] >> token % 32 & 1:
                expected[row, token] = -math.inf
    for kernels in (RefKernels(torch.device("cpu")), *map(CpuKernels, _cpu.names())):
        x = fenced(before)
        kernels.forbid(x, rows, bits)
        assert same_bits(x.clone(), expected), kernels.name
        fence = x._base
        assert fence is not None and fence[:7].isnan().all() and fence[7 + x.numel() :].isnan().all()
