"""Sequences whose keys and values are known, laid into the compiled kernels' pages in whatever way a test asks for.

It knows how to call the extension by address, and must not know how pages are laid out inside.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.kernels import Batch, _cpu, set_threads
from shoal.kernels.ref import RefKernels

Piece = tuple[int, int, int]  # sequence, first position, end position


@dataclass(frozen=True)
class Sequence:
    """Keys and values [positions, G, E] and the queries [new, H, E] of the last positions. The first `shared`
    positions are also those of sequence `parent`."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    parent: int = -1
    shared: int = 0

    @property
    def length(self) -> int:
        return len(self.keys)

    @property
    def zero(self) -> int:
        """Position of the first query."""
        return len(self.keys) - len(self.queries)


@dataclass(frozen=True)
class Layout:
    """How sequences get into pages and steps. None of it may change a bit of the result."""

    page_size: int = 32
    seed: int = 0  # of the page numbers
    together: bool = True  # shared positions are in the same pages, as far as pages are whole
    share: bool = True  # the plan looks for shared runs
    chunk: int = 1 << 30  # tokens of a sequence per step
    alone: bool = False  # every sequence in steps of its own
    threads: int = 1


@dataclass(frozen=True)
class Heads:
    """Widths and rules of one layer."""

    group: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    window: int = 0
    softcap: float = 0.0
    rounded: bool = False  # keys and values are kept as int8

    @property
    def count(self) -> int:
        return self.group * self.kv_heads

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)


def make_sequences(heads: Heads, shapes: list[tuple[int, int, int, int]], seed: int = 0) -> list[Sequence]:
    """One sequence per (own positions, new tokens, parent, shared); parent < 0 for none."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, heads.width, generator=generator).to(heads.dtype)

    sequences: list[Sequence] = []
    for own, new, parent, shared in shapes:
        keys, values = noise(own, heads.kv_heads) * 2, noise(own, heads.kv_heads)
        shared = min(shared, sequences[parent].length) if parent >= 0 else 0
        if shared:
            keys = torch.cat([sequences[parent].keys[:shared], keys])
            values = torch.cat([sequences[parent].values[:shared], values])
        queries = noise(min(new, own), heads.count)
        sequences.append(Sequence(keys, values, queries, parent if shared else -1, shared))
    return sequences


def deal_pages(sequences: list[Sequence], layout: Layout) -> tuple[Tensor, int]:
    """The page table [N, B] of these sequences, and the number of pages."""
    size = layout.page_size
    counts = [-(-s.length // size) for s in sequences]
    deck = list(range(sum(counts) + 3))
    random.Random(layout.seed).shuffle(deck)
    rows: list[list[int]] = []
    for sequence, count in zip(sequences, counts, strict=True):
        # A sequence writes from `zero` on, so pages with such positions are its own.
        kept = min(sequence.shared, sequence.zero) // size if layout.together and sequence.parent >= 0 else 0
        kept = min(kept, sequences[sequence.parent].length // size)
        rows.append((rows[sequence.parent][:kept] if kept else []) + [deck.pop() for _ in range(count - kept)])
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for to, row in zip(table, rows, strict=True):
        to[: len(row)] = torch.tensor(row)
    return table, sum(counts) + 3


class Cache:
    """Pages of one layer, full of NaN until something is placed."""

    def __init__(self, heads: Heads, num_pages: int, page_size: int) -> None:
        padded = -(-heads.width // 32) * 32
        size = 16 * (padded + 4) if heads.rounded else 16 * padded * heads.dtype.itemsize
        shape = (heads.kv_heads, num_pages, page_size // 16, size)
        self.heads, self.page_size = heads, page_size
        memory = torch.full((2, *shape), 255, dtype=torch.uint8)  # floats of these bytes are NaN
        self.keys, self.values = memory.transpose(1, 2)  # by page, then head
        kinds = {torch.float32: _cpu.Kind.FP32, torch.bfloat16: _cpu.Kind.BF16}
        kind = _cpu.Kind.INT8 if heads.rounded else kinds[heads.dtype]
        self.pages = _cpu.Pages(
            self.keys.data_ptr(), self.values.data_ptr(), num_pages, page_size, heads.kv_heads, heads.width, kind
        )

    def place(
        self, table: _cpu.Table, qkv: Tensor, position: Tensor, slot: Tensor, how: _cpu.Heads | None = None
    ) -> None:
        """Rows [query heads | key heads | value heads] into slots; by default neither normed nor rotated."""
        how = how or _cpu.Heads(self.heads.count, 0, 0, 0, 0, 0, 0.0, False)
        assert qkv.is_contiguous() and qkv.dtype == self.heads.dtype
        table.place(qkv.data_ptr(), how, self.pages, position.data_ptr(), slot.data_ptr(), len(qkv))


def slots_of(table: Tensor, sequence: int, first: int, end: int, page_size: int) -> Tensor:
    position = torch.arange(first, end)
    return table[sequence].long()[position // page_size] * page_size + position % page_size


def steps_of(sequences: list[Sequence], layout: Layout) -> list[list[Piece]]:
    """Which positions each step computes: every sequence's new ones, in chunks."""
    pieces = [
        [(n, first, min(first + layout.chunk, s.length)) for first in range(s.zero, s.length, layout.chunk)]
        for n, s in enumerate(sequences)
    ]
    if layout.alone:
        return [[piece] for own in pieces for piece in own]
    longest = max(len(own) for own in pieces)
    return [[own[i] for own in pieces if i < len(own)] for i in range(longest)]


def run(name: str, heads: Heads, sequences: list[Sequence], layout: Layout) -> list[Tensor]:
    """Each sequence's output [new, H, E] by the compiled kernels of instruction set `name`."""
    kernels = _cpu.Table(name)
    table, num_pages = deal_pages(sequences, layout)
    cache = Cache(heads, num_pages, layout.page_size)
    for n, s in enumerate(sequences):
        _place(kernels, cache, table, sequences, [(n, 0, s.zero)])
    outs = [torch.empty_like(s.queries) for s in sequences]
    before = torch.get_num_threads()
    set_threads(layout.threads)
    try:
        for step in steps_of(sequences, layout):
            qkv = _place(kernels, cache, table, sequences, step)
            out = _attend(kernels, cache, table, step, qkv, layout.share)
            for (n, first, end), rows in zip(step, out.split([end - first for _, first, end in step]), strict=True):
                outs[n][first - sequences[n].zero : end - sequences[n].zero] = rows
    finally:
        set_threads(before)
    return outs


def _place(kernels: _cpu.Table, cache: Cache, table: Tensor, sequences: list[Sequence], step: list[Piece]) -> Tensor:
    """The step's rows, with zeros for queries of positions before the new ones."""
    rows, positions, slots = [], [], []
    for n, first, end in step:
        s = sequences[n]
        queries = torch.zeros(end - first, cache.heads.count, cache.heads.width, dtype=cache.heads.dtype)
        if first >= s.zero:
            queries = s.queries[first - s.zero : end - s.zero]
        rows.append(torch.cat([queries, s.keys[first:end], s.values[first:end]], dim=1).flatten(1))
        positions.append(torch.arange(first, end))
        slots.append(slots_of(table, n, first, end, cache.page_size))
    qkv = torch.cat(rows).contiguous()
    cache.place(kernels, qkv, torch.cat(positions), torch.cat(slots))
    return qkv


def plan_of(table: Tensor, step: list[Piece], page_size: int, num_pages: int, share: bool) -> _cpu.Plan:
    rows = table[[n for n, _, _ in step]].contiguous()
    start = torch.tensor([0, *(end - first for _, first, end in step)]).cumsum(0)
    length = torch.tensor([end for _, _, end in step])
    arrays = start.data_ptr(), length.data_ptr(), rows.data_ptr()
    return _cpu.Plan(*arrays, len(step), rows.shape[1], page_size, num_pages, share)


def _attend(kernels: _cpu.Table, cache: Cache, table: Tensor, step: list[Piece], qkv: Tensor, share: bool) -> Tensor:
    heads = cache.heads
    plan = plan_of(table, step, cache.page_size, len(cache.keys), share)
    out = torch.full((len(qkv), heads.count, heads.width), torch.nan, dtype=heads.dtype)
    states = torch.full((len(qkv), heads.count, -(-heads.width // 32) * 32 + 2), torch.nan)
    kernels.attention(
        plan, cache.pages, qkv.data_ptr(), qkv.shape[1], heads.count, heads.scale, heads.window, heads.softcap,
        states.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def reference(heads: Heads, sequences: list[Sequence]) -> list[Tensor]:
    """The same by the specification, in float32 from the same keys, values and queries, rounded where pages are."""
    kernels = RefKernels(torch.device("cpu"))
    layout = Layout(together=False)
    table, num_pages = deal_pages(sequences, layout)
    kept = torch.int8 if heads.rounded else torch.float32
    kv = kernels.new_kv(1, num_pages, layout.page_size, heads.kv_heads, heads.width, kept)
    for n, s in enumerate(sequences):
        kernels.write_kv(kv, 0, s.keys.float(), s.values.float(), slots_of(table, n, 0, s.length, layout.page_size))
    counts = [len(s.queries) for s in sequences]
    start = torch.tensor([0, *counts]).cumsum(0)
    position = torch.cat([torch.arange(s.zero, s.length) for s in sequences])
    length = torch.tensor([s.length for s in sequences])
    batch = Batch(position, position, position, start, table, length, start[1:] - 1)
    queries = torch.cat([s.queries for s in sequences]).float()
    plan = kernels.plan(batch, kv)
    out = kernels.attention(queries, kv, 0, plan, heads.scale, heads.window, heads.softcap)
    return list(out.split(counts))


def layouts() -> list[Layout]:
    """Ways to run the same sequences that must agree to the bit."""
    base = Layout()
    sizes = [replace(base, page_size=size, seed=size) for size in (16, 64, 128, 256)]
    others = [
        replace(base, share=False),
        replace(base, together=False, seed=5),
        replace(base, alone=True),
        replace(base, chunk=1),
        replace(base, chunk=7, page_size=16),
        replace(base, threads=2),
        replace(base, threads=2, share=False, page_size=64),
    ]
    return [base, *sizes, *others]
