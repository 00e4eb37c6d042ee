"""A Step as tensors. It knows pages by number and tokens by value; it must not know requests, models or layouts of KV.

T = tokens of the step, N = slices, B = pages of the longest slice, P = page size, R = wanted positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from shoal.core.types import PENDING, Move, Step
from shoal.kernels.api import Batch


def build_batch(step: Step, page_size: int, vocab_size: int, last: Mapping[int, int], device: torch.device) -> Batch:
    """Lay the slices of a step one after the other; the wanted positions in the same order. There is at least one.

    `last` has the token that each ticket sampled last. A PENDING token of a ticket that sampled nothing, and a token
    outside the vocabulary, become some token of it: their rows have failed, and nobody reads what comes of them.
    """
    slices = step.slices
    count_N = np.array([len(each.tokens) for each in slices], dtype=np.int64)
    begin_N = np.array([each.start for each in slices], dtype=np.int64)
    want_N = np.array([each.want for each in slices], dtype=np.int64)
    start_N1 = np.concatenate([[0], np.cumsum(count_N)])
    owner_T = np.repeat(np.arange(len(slices)), count_N)
    ids_T = np.frombuffer(b"".join([memoryview(each.tokens) for each in slices]), dtype=np.int32).astype(np.int64)
    pending = np.flatnonzero(ids_T == PENDING)
    ids_T[pending] = [last.get(slices[n].ticket, 0) for n in owner_T[pending]]
    np.clip(ids_T, 0, vocab_size - 1, out=ids_T)
    pos_T = np.arange(len(ids_T)) + (begin_N - start_N1[:-1])[owner_T]
    table_NB = _table([each.blocks for each in slices])
    slot_T = table_NB[owner_T, pos_T // page_size] * np.int64(page_size) + pos_T % page_size
    owner_R = np.repeat(np.arange(len(slices)), want_N)
    offset_R = np.arange(len(owner_R)) - (np.cumsum(want_N) - want_N)[owner_R]
    out_R = (start_N1[1:] - want_N)[owner_R] + offset_R

    def tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    return Batch(
        ids_T=tensor(ids_T), pos_T=tensor(pos_T), slot_T=tensor(slot_T), start_N1=tensor(start_N1),
        table_NB=tensor(table_NB), length_N=tensor(begin_N + count_N), out_R=tensor(out_R),
    )  # fmt: skip


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
