"""What encoders need of the kernels: right against exact arithmetic, and the same bits in company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elementwise_kernels import fenced, noise, same_bits
from torch import Tensor

from shoal.kernels import Kernels, _cpu, set_threads
from shoal.kernels.cpu import CpuKernels
from shoal.kernels.ref import RefKernels

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["ref", *_cpu.names()]
COLUMNS = st.one_of(st.integers(1, 200), st.sampled_from([255, 384, 385, 768, 1536]))


def backend(name: str) -> Kernels:
    return RefKernels(torch.device("cpu")) if name == "ref" else CpuKernels(name)


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_threads(before)


def close(got: Tensor, exact: Tensor) -> bool:
    """Within a few roundings of float32, or of the dtype."""
    room = 2e-6 if got.dtype == torch.float32 else 2**-8
    return bool(((got.double() - exact).abs() <= room * (1 + exact.abs())).all())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(columns=COLUMNS, rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_layer_norm_is_that_of_exact_arithmetic(
    name: str, dtype: torch.dtype, columns: int, rows: int, seed: int
) -> None:
    x = fenced((noise(rows, columns, seed=seed) * 3 + 1).to(dtype))
    weight, bias = fenced(noise(columns, seed=seed + 1)), fenced(noise(columns, seed=seed + 2))
    got = backend(name).layer_norm(x, weight, bias, 1e-3)
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-3)
    assert got.dtype == dtype and close(got, exact)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_that_of_exact_arithmetic(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e30])])
    x = x.to(dtype)
    exact = torch.nn.functional.gelu(x.double())
    assert close(backend(name).gelu(fenced(x)), exact)


@pytest.mark.parametrize("name", BACKENDS)
def test_gelu_of_what_is_no_number_is_none(name: str) -> None:
    assert bool(backend(name).gelu(torch.full((19,), torch.nan)).isnan().all())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_within_a_text_is_that_of_exact_arithmetic(name: str, dtype: torch.dtype) -> None:
    lengths, heads, width = [7, 7, 1, 130, 3, 3, 3], 3, 32
    qkv = noise(sum(lengths), 3 * heads * width, seed=3, dtype=dtype)
    got = backend(name).attention_within(qkv, heads, lengths, width**-0.5)
    exact = []
    for part in qkv.double().split(lengths):
        q, k, v = (one.unflatten(1, (heads, width)).transpose(0, 1) for one in part.chunk(3, dim=1))
        exact.append(((q @ k.transpose(1, 2) * width**-0.5).softmax(2) @ v).transpose(0, 1).flatten(1))
    room = 1e-5 if dtype == torch.float32 else 0.03
    assert got.dtype == dtype and (got.double() - torch.cat(exact)).abs().max() < room


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 26])
def test_attention_within_is_the_same_in_any_company(name: str, threads: int, dtype: torch.dtype, width: int) -> None:
    """Also with heads whose rows begin anywhere, and with more threads than texts."""
    kernels, lengths, heads = backend(name), [64, 64, 64, 64, 64, 200, 41, 41, 41, 9, 9, 300, 1], 12
    qkv = noise(sum(lengths), 3 * heads * width, seed=4).to(dtype)
    set_threads(1)
    alone = [kernels.attention_within(part, heads, [len(part)], 0.25) for part in qkv.split(lengths)]
    set_threads(threads)
    assert same_bits(kernels.attention_within(qkv, heads, lengths, 0.25).float(), torch.cat(alone).float())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_company_and_threads_change_no_bit(name: str, threads: int) -> None:
    kernels, lengths = backend(name), [200, 40, 40, 40, 9, 9, 300, 1]
    qkv, x = noise(sum(lengths), 3 * 64, seed=4), noise(sum(lengths), 75, seed=5)
    weight, bias = noise(75, seed=6), noise(75, seed=7)
    set_threads(1)
    alone = [kernels.attention_within(part, 4, [len(part)], 0.25) for part in qkv.split(lengths)]
    normed = [kernels.layer_norm(part.contiguous(), weight, bias, 1e-12) for part in x.split(lengths)]
    swelled = [kernels.gelu(part.clone()) for part in x.split(lengths)]
    set_threads(threads)
    assert same_bits(kernels.attention_within(qkv, 4, lengths, 0.25), torch.cat(alone))
    many = x.repeat(200, 1)  # enough for several threads
    assert same_bits(kernels.layer_norm(many, weight, bias, 1e-12)[-len(x) :], torch.cat(normed))
    assert same_bits(kernels.gelu(many)[-len(x) :], torch.cat(swelled))
