"""Single kernels against the machine's limits: linear layers by rows and shape, attention by what rows share.

It knows shapes, operations and bytes of the kernels' functions; it must not know engines or workloads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from shoal.bench.floor import ARITHMETIC, HEAD
from shoal.bench.limits import Limits
from shoal.kernels import Batch, Kernels, load
from shoal.kernels.api import Heads
from shoal.kernels.quantize import weight_bytes
from shoal.nn.weights import MODES

ROWS = (1, 8, 32, 64, 256, 2048)
WIDTH, INNER, VOCAB = 896, 4864, 151936  # Qwen2.5-0.5B
_SHAPES = (("qkv", 1152, WIDTH), ("out", WIDTH, WIDTH), ("gate up", 2 * INNER, WIDTH), ("down", WIDTH, INNER))
_HEADS = ((14, 2, 64), (32, 8, 128))  # of queries, of keys, width: Qwen2.5-0.5B and Llama 3 8B
_SEQUENCES, _SHARED, _OWN = 32, 1024, 64  # of attention
_PAGE = 32
_COLD = 512 << 20  # bytes gone through before anything is read again: more than caches hold
_TRY = 0.15  # seconds of a measurement


@dataclass(frozen=True, slots=True)
class Measured:
    """One kernel: seconds of a call, its operations and the bytes it must read, and the share of the limit."""

    name: str
    seconds: float
    operations: float
    bytes: float
    share: float

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.name:44} {1e3 * self.seconds:9.3f} ms {self.operations / self.seconds / 1e9:7.0f} GF/s "
            f"{self.bytes / self.seconds / 1e9:6.1f} GB/s {100 * self.share:4.0f}% of the limit"
        )


def measure(
    limits: Limits, arithmetic: str, name: str, operations: float, size: float, calls: list[Callable[[], object]]
) -> Measured:
    """Time the calls in turn: the median of rounds, as neighbours disturb some. `size` and `operations` are a call's.

    The limit is the larger of operations at the register peak of the arithmetic and bytes at the bandwidth.
    """
    rounds: list[float] = []
    end = time.perf_counter() + _TRY
    calls[0]()
    while len(rounds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        for call in calls:
            call()
        rounds.append((time.perf_counter() - began) / len(calls))
    seconds = median(rounds)
    least = max(operations / limits.peak[arithmetic], size / limits.bandwidth)
    return Measured(name, seconds, operations, size, least / seconds)


def run(limits: Limits, mode: str) -> Iterator[Measured]:
    """Linear layers of Qwen2.5-0.5B with weights of a mode, then its head, and attention."""
    kernels = load("auto")
    for name, outputs, inputs in _SHAPES:
        yield from _linear(limits, kernels, mode, name, outputs, inputs)
    yield from _head(limits, kernels, mode)
    dtype = MODES[mode].dtype
    for heads in _HEADS:
        for kept in (dtype,) if mode == "fp32" else (dtype, torch.int8):
            yield from _attention(limits, kernels, kept, *heads)


def random(*shape: int, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers of that scale; a block of random ones over and over, as drawing them all would take seconds."""
    count = 1
    for size in shape:
        count *= size
    block = (torch.randn(min(count, 1 << 20)) * scale).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def _linear(limits: Limits, kernels: Kernels, mode: str, name: str, outputs: int, inputs: int) -> Iterator[Measured]:
    dtype, kept, _ = MODES[mode]
    weight = random(outputs, inputs, dtype=dtype)
    size = dtype.itemsize * outputs * inputs if kept == "plain" else weight_bytes(kept, outputs, inputs)
    # As in a model, where a layer's weights are long out of the caches when they are needed again.
    copies = range(-(-_COLD // size))
    if name == "gate up":
        packed, run = [kernels.pack_gated(weight, mode=kept) for _ in copies], kernels.gated
    else:
        packed, run = [kernels.pack(weight, mode=kept) for _ in copies], kernels.linear
    for rows in ROWS:
        x = random(rows, inputs, scale=1.0, dtype=dtype)
        calls: list[Callable[[], object]] = [partial(run, x, each) for each in packed]
        calls = calls if rows < 256 else calls[: max(1, len(calls) // rows)]
        label = f"{mode} linear {name} {outputs} x {inputs}, {rows} rows"
        yield measure(limits, ARITHMETIC[mode], label, 2.0 * rows * outputs * inputs, size, calls)


def _head(limits: Limits, kernels: Kernels, mode: str) -> Iterator[Measured]:
    dtype, _, kept = MODES[mode]
    packed = kernels.pack(random(VOCAB, WIDTH, dtype=dtype), mode=kept)
    size = dtype.itemsize * VOCAB * WIDTH if kept == "plain" else weight_bytes(kept, VOCAB, WIDTH)
    for rows in ROWS[:-2]:
        x = random(rows, WIDTH, scale=1.0, dtype=dtype)
        label = f"head {VOCAB} x {WIDTH}, {rows} rows"
        yield measure(limits, HEAD[mode], label, 2.0 * rows * VOCAB * WIDTH, size, [partial(kernels.logits, x, packed)])


# -- attention -----------------------------------------------------------------------------------------


def _tables(shared: int) -> torch.Tensor:
    """Pages of each sequence, the first `shared` positions in pages that all have."""
    pages, common = (_SHARED + _OWN) // _PAGE, shared // _PAGE
    table = torch.empty((_SEQUENCES, pages), dtype=torch.int32)
    table[:, :common] = torch.arange(common)
    own = pages - common
    table[:, common:] = common + torch.arange(_SEQUENCES * own).view(_SEQUENCES, own)
    return table


def _batch(table: torch.Tensor, begin: int, end: int) -> Batch:
    """Every sequence computes positions begin … end - 1."""
    count, tokens = end - begin, len(table) * (end - begin)
    position = torch.arange(begin, end).repeat(len(table))
    page = table[:, torch.arange(begin, end) // _PAGE].long().flatten()
    return Batch(
        ids_T=torch.zeros(tokens, dtype=torch.int64), pos_T=position, slot_T=page * _PAGE + position % _PAGE,
        start_N1=torch.arange(0, tokens + 1, count), table_NB=table.contiguous(),
        length_N=torch.full((len(table),), end), out_R=torch.arange(count - 1, tokens, count),
    )  # fmt: skip


def _attention(
    limits: Limits, kernels: Kernels, kept: torch.dtype, queries: int, keys: int, width: int
) -> Iterator[Measured]:
    """One new token for each of 32 sequences, all alone or with 1,024 positions shared; then chunks of one prompt.

    `kept` is the dtype of keys and values. Bytes are those of their numbers, without scales.
    """
    length, name = _SHARED + _OWN, f"{queries}/{keys}/{width}"
    name, dtype = (f"int8 {name}", torch.bfloat16) if kept == torch.int8 else (name, kept)
    position = 2 * kept.itemsize * keys * width  # bytes of a position in one layer
    layers = max(2, -(-_COLD // (position * _SEQUENCES * length)))
    kv = kernels.new_kv(layers, _SEQUENCES * length // _PAGE, _PAGE, keys, width, kept)
    heads = kernels.prepare_heads(Heads(queries, keys, width))
    private = _tables(0)
    for first in range(0, _SEQUENCES, 4):
        batch = _batch(private[first : first + 4], 0, length)
        for layer in range(layers):
            qkv = random(4 * length, (queries + 2 * keys) * width, scale=1.0, dtype=dtype)
            kernels.place(qkv, heads, kv, layer, batch)
    scale = width**-0.5

    def timed(label: str, batch: Batch, operations: float, size: float) -> Measured:
        q = random(len(batch.ids_T), queries, width, scale=1.0, dtype=dtype)
        plan = kernels.plan(batch, kv)
        calls: list[Callable[[], object]] = [
            partial(kernels.attention, q, kv, layer, plan, scale) for layer in range(layers)
        ]
        arithmetic = "fp32" if dtype == torch.float32 else "bf16"
        return measure(limits, arithmetic, f"attention {name}, {label}", operations, size, calls)

    pairs = 4.0 * queries * width
    label = f"{_SEQUENCES} x {length} tokens"
    work = pairs * _SEQUENCES * length
    yield timed(f"{label}, none shared", _batch(private, length - 1, length), work, position * _SEQUENCES * length)
    distinct = _SHARED + _SEQUENCES * _OWN
    yield timed(f"{label}, {_SHARED} shared", _batch(_tables(_SHARED), length - 1, length), work, position * distinct)
    for begin, end in ((0, length), (_SHARED // 2, length)):
        contexts = sum(range(begin + 1, end + 1))
        yield timed(f"positions {begin} to {end}", _batch(private[:1], begin, end), pairs * contexts, position * end)
