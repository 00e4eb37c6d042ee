"""A Step as tensors. It knows pages by number and tokens by value; it must not know requests, models or layouts of KV.

T = tokens of the step, N = slices, B = pages of the longest slice, P = page size, R = wanted positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from shoal.core.types import PENDING, Move, Step
from shoal.kernels.api import Batch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """A step laid out before its time: all of it is known but the tokens that earlier steps are still computing."""

    ids_T: Ints
    pos_T: Ints
    slot_T: Ints
    start_N1: Ints
    table_NB: npt.NDArray[np.int32]
    length_N: Ints
    out_R: Ints
    pending_K: Ints  # places in ids_T, and whose tokens they wait for
    tickets_K: list[int]
    want_N: Ints  # wanted positions of each slice, its last ones
    adapter_T: Ints | None = None  # as in Batch

    def batch(self, last: Mapping[int, int], device: torch.device) -> Batch:
        """The step as tensors. `last` has the token that each ticket sampled last; one that sampled nothing gets some
        token of the vocabulary: its row has failed, and nobody reads what comes of it."""
        if self.tickets_K:
            self.ids_T[self.pending_K] = [last.get(ticket, 0) for ticket in self.tickets_K]

        def tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        arrays = (self.ids_T, self.pos_T, self.slot_T, self.start_N1, self.table_NB, self.length_N, self.out_R)
        whole = Batch(*map(tensor, arrays), adapter_T=None if self.adapter_T is None else tensor(self.adapter_T))
        if len(self.out_R) == len(self.ids_T):
            return whole
        some_N, out_R = np.flatnonzero(self.want_N), self.out_R
        start_N1 = np.concatenate([[0], np.cumsum(self.want_N[some_N])])
        arrays = (
            self.ids_T[out_R], self.pos_T[out_R], self.slot_T[out_R], start_N1, self.table_NB[some_N],
            self.length_N[some_N], np.arange(len(out_R)),
        )  # fmt: skip
        return replace(whole, wanted=Batch(*map(tensor, arrays)))


def lay_out(step: Step, page_size: int, vocab_size: int, adapters: Mapping[int, int] | None = None) -> Layout:
    """Lay the slices of a step one after the other; the wanted positions in the same order. There is at least one.

    `adapters` has the number of the adapter of each ticket that has one. A token outside the vocabulary becomes some
    token of it: its row has failed too.
    """
    slices = step.slices
    count_N = np.array([len(each.tokens) for each in slices], dtype=np.int64)
    begin_N = np.array([each.start for each in slices], dtype=np.int64)
    want_N = np.array([each.want for each in slices], dtype=np.int64)
    start_N1 = np.concatenate([[0], np.cumsum(count_N)])
    owner_T = np.repeat(np.arange(len(slices)), count_N)
    ids_T = np.frombuffer(b"".join([memoryview(each.tokens) for each in slices]), dtype=np.int32).astype(np.int64)
    pending_K = np.flatnonzero(ids_T == PENDING)
    tickets_K = [slices[n].ticket for n in owner_T[pending_K]]
    np.clip(ids_T, 0, vocab_size - 1, out=ids_T)
    pos_T = np.arange(len(ids_T)) + (begin_N - start_N1[:-1])[owner_T]
    table_NB = _table([each.blocks for each in slices])
    slot_T = table_NB[owner_T, pos_T // page_size] * np.int64(page_size) + pos_T % page_size
    owner_R = np.repeat(np.arange(len(slices)), want_N)
    offset_R = np.arange(len(owner_R)) - (np.cumsum(want_N) - want_N)[owner_R]
    out_R = (start_N1[1:] - want_N)[owner_R] + offset_R
    adapter_T = None
    if adapters and any(each.ticket in adapters for each in slices):
        adapter_T = np.array([adapters.get(each.ticket, -1) for each in slices], dtype=np.int64)[owner_T]
    arrays = (ids_T, pos_T, slot_T, start_N1, table_NB, begin_N + count_N, out_R)
    return Layout(*arrays, pending_K, tickets_K, want_N, adapter_T)


def _table(blocks: list[tuple[int, ...]]) -> npt.NDArray[np.int32]:
    """Pages of each slice as a row, filled up with 0."""
    count_N = np.array([len(each) for each in blocks], dtype=np.int64)
    table_NB = np.zeros((len(blocks), int(count_N.max())), dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(blocks), dtype=np.int32, count=int(count_N.sum()))
    table_NB[np.arange(table_NB.shape[1]) < count_N[:, None]] = flat
    return table_NB


def moves_tensor(moves: tuple[Move, ...]) -> torch.Tensor:
    """(src, dst, tokens) rows for `Kernels.move_blocks`, int64 on the CPU."""
    return torch.tensor([[each.src, each.dst, each.tokens] for each in moves], dtype=torch.int64).reshape(-1, 3)
