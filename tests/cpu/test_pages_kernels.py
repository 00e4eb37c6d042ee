"""Keys and values reach their slots normed and rotated as the specification says, and moves copy exactly the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Cache, Heads
from torch import Tensor

from shoal.kernels import _cpu, set_threads
from shoal.kernels.quantize import quantize_heads
from shoal.kernels.ref import RefKernels

TYPES = [torch.float32, torch.bfloat16, torch.int8]  # of keys and values in their pages; int8 is given bf16
NAMES = _cpu.names()
EPS = 1e-6
PAGES, SIZE = 4, 32


def at(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def heads_of(group: int, kv_heads: int, width: int, kept: torch.dtype) -> Heads:
    rounded = kept == torch.int8
    return Heads(group, kv_heads, width, torch.bfloat16 if rounded else kept, rounded=rounded)


def unpacked(cache: Cache) -> list[Tensor]:
    """Keys and values as [pages * page size, G, padded width], and the scales of each as [pages * page size, G] where
    they are rounded: the layouts written down a second time."""
    pages, heads, units, _ = cache.keys.shape
    rows, padded = pages * units * 16, -(-cache.heads.width // 32) * 32
    head, dtype = (64, torch.int8) if cache.heads.rounded else (0, cache.heads.dtype)
    n = 1 if dtype == torch.float32 else 2
    keys, values = (x[..., head:].contiguous().view(dtype) for x in (cache.keys, cache.values))
    keys = keys.view(pages, heads, units, padded // n, 16, n).permute(0, 2, 4, 1, 3, 5)
    values = values.view(pages, heads, units, padded // 32, 16 // n, 32, n).permute(0, 2, 4, 6, 1, 3, 5)
    scales = [x[..., :head].contiguous().view(torch.float32) for x in (cache.keys, cache.values) if head]
    return [
        *(x.reshape(rows, heads, padded) for x in (keys, values)),
        *(x.transpose(1, 2).transpose(2, 3).reshape(rows, heads) for x in scales),
    ]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Heads, int, str]:
    """Heads, how many pairs are rotated (0: no positions at all), and which norm."""
    width = draw(st.sampled_from([1, 8, 15, 16, 24, 31, 64, 80, 96, 128, 256]))
    heads = heads_of(draw(st.integers(1, 4)), draw(st.integers(1, 3)), width, draw(st.sampled_from(TYPES)))
    return heads, draw(st.sampled_from([0, width // 2, width // 4])), draw(st.sampled_from(["none", "head", "whole"]))


def positioned(x: Tensor, norm: Tensor | None, whole: bool, table: tuple[Tensor, Tensor] | None, pos: Tensor) -> Tensor:
    """[T, heads, E] as the decoder's layers do it with the specification's functions."""
    kernels = RefKernels(torch.device("cpu"))
    if norm is not None:
        x = kernels.rms_norm(x.flatten(1), norm, EPS).view(x.shape) if whole else kernels.rms_norm(x, norm, EPS)
    return kernels.rope(x, pos, *table) if table else x


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(layer=layers(), tokens=st.integers(1, 40), threads=st.integers(1, 2), seed=st.integers(0, 99))
def test_keys_and_values_are_placed_as_the_specification_says(
    name: str, layer: tuple[Heads, int, str], tokens: int, threads: int, seed: int
) -> None:
    heads, rotated, kind = layer
    generator = torch.Generator().manual_seed(seed)
    counts = [heads.count, heads.kv_heads, heads.kv_heads]
    qkv = torch.randn(tokens, sum(counts), heads.width, generator=generator).to(heads.dtype)
    position = torch.randint(0, 50, (tokens,), generator=generator)
    slot = torch.randperm(PAGES * SIZE, generator=generator)[:tokens]
    angles = torch.rand(50, rotated, generator=generator) * 6
    table = (angles.cos(), angles.sin()) if rotated else None
    per_kind = {"none": [0, 0], "head": [1, 1], "whole": counts[:2]}[kind]
    norms = [torch.rand(n * heads.width, generator=generator) + 0.5 if n else None for n in per_kind]
    cosine, sine = table or (None, None)
    how = _cpu.Heads(heads.count, rotated, at(cosine), at(sine), at(norms[0]), at(norms[1]), EPS, kind == "whole")

    q, k, v = qkv.split(counts, dim=1)
    expected = [positioned(x, norm, kind == "whole", table, position) for x, norm in zip((q, k), norms, strict=True)]
    v = v.clone()
    cache = Cache(heads, PAGES, SIZE)
    set_threads(threads)
    cache.place(_cpu.Table(name), qkv, position, slot, how)
    set_threads(1)

    keys, values, *scales = unpacked(cache)
    # A norm sums in another order, which may turn the last bit; the rotation may then double it.
    step = 0.0 if kind == "none" else 2.0**-6 if heads.dtype == torch.bfloat16 else 2.0**-20
    torch.testing.assert_close(qkv[:, : heads.count].contiguous(), expected[0], rtol=step, atol=step)
    placed = qkv[:, heads.count : heads.count + heads.kv_heads].contiguous()
    torch.testing.assert_close(placed, expected[1], rtol=step, atol=step)
    wanted = [placed, v]
    if heads.rounded:
        placed, key_scale, v, value_scale = quantize_heads(placed, v)
        wanted = [placed, v, key_scale, value_scale]
    found = [keys[..., : heads.width], values[..., : heads.width], *scales]
    assert all(torch.equal(each[slot], truth) for each, truth in zip(found, wanted, strict=True))
    assert not keys[slot, :, heads.width :].any()
    untouched = torch.ones(PAGES * SIZE, dtype=torch.bool).index_fill(0, slot, False)
    assert all((each[untouched].contiguous().view(torch.uint8) == 255).all() for each in (keys, values, *scales))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_is_placed_with_the_same_bits_in_any_company(name: str, dtype: torch.dtype) -> None:
    heads = heads_of(7, 2, 64, dtype)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 18 * 64, generator=generator).to(heads.dtype)
    angles = torch.rand(100, 32, generator=generator) * 6
    cosine, sine, norm = angles.cos(), angles.sin(), torch.rand(64, generator=generator)
    how = _cpu.Heads(14, 32, at(cosine), at(sine), at(norm), at(norm), EPS, False)
    position, slot = torch.arange(96), torch.arange(96).flip(0)
    found = []
    for size, threads in ((96, 1), (96, 2), (1, 1), (17, 2)):
        cache, qkv = Cache(heads, PAGES, SIZE), rows.clone()
        set_threads(threads)
        for part in torch.arange(96).split(size):
            some = qkv[part]
            cache.place(_cpu.Table(name), some, position[part], slot[part], how)
            qkv[part] = some
        set_threads(1)
        found.append((qkv, cache.keys, cache.values))
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    width=st.sampled_from([8, 33, 64]),
    kv_heads=st.integers(1, 3),
    moves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, SIZE)), max_size=8),
    threads=st.integers(1, 2),
)
def test_moves_copy_the_first_tokens_in_order(
    name: str, dtype: torch.dtype, width: int, kv_heads: int, moves: list[tuple[int, int, int]], threads: int
) -> None:
    cache = Cache(heads_of(1, kv_heads, width, dtype), 6, SIZE)
    generator = torch.Generator().manual_seed(1)
    for tensor in (cache.keys, cache.values):
        tensor.random_(0, 64, generator=generator)  # bytes that make no NaN
    expected = [x.view(6, SIZE, kv_heads, -1).clone() for x in unpacked(cache)]
    for src, dst, tokens in moves:
        for x in expected:
            x[dst, :tokens] = x[src, :tokens].clone()
    moves_M3 = torch.tensor(moves, dtype=torch.int64).view(-1, 3)
    set_threads(threads)
    _cpu.Table(name).move(cache.pages, moves_M3.data_ptr(), len(moves))
    set_threads(1)
    found = unpacked(cache)
    assert all(
        torch.equal(x.flatten(0, 1), y.view(6 * SIZE, kv_heads, -1)) for x, y in zip(expected, found, strict=True)
    )
