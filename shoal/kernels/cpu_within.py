"""Attention inside whole sequences that need no pages: torch's own, on all sequences of one length at once.

It knows how rows of queries, keys and values lie side by side; it must not know models or why sequences have lengths.
What a sequence comes to is the same in any company: its products have its own shape, whoever stands beside it.

T tokens, W width of a row, H heads, E head width, N sequences of one length L.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_within(qkv_TW: Tensor, num_heads: int, lengths: Sequence[int], scale: float) -> Tensor:
    """`Kernels.attention_within` on the CPU. Neighbours of equal length are computed together, without padding."""
    tokens, width = qkv_TW.shape
    out_TD = torch.empty((tokens, width // 3), dtype=qkv_TW.dtype)
    first = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        rows = slice(first, first + count * length)
        # In memory of their own, as floats: for 16 bits torch chooses a product by how many sequences and threads there
        # are, and a product may depend on where its operands begin.
        q, k, v = qkv_TW[rows].view(count, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4).float().contiguous()
        mixed_NHLE = scaled_dot_product_attention(q, k, v, scale=scale)
        out_TD[rows] = mixed_NHLE.transpose(1, 2).reshape(count * length, -1).to(out_TD.dtype)
        first = rows.stop
    assert first == tokens, (first, tokens)
    return out_TD
