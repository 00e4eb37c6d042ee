"""A matrix product in plain torch whose rows do not depend on their company. It must not know what is multiplied.

The same call is made whatever the number of rows: 16 rows by K by N, rows filled up with zeros, K and N filled up to
multiples of 16 (odd widths change the order of summation with the number of threads).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16  # rows of one product
WIDTH = 16  # K and N are filled up to a multiple of this
ALIGNMENT = 64  # bytes; libraries may begin a row differently elsewhere


def fill_weight(weight_NK: Tensor) -> Tensor:
    """A weight with zeros up to the next multiples of WIDTH; itself where there is nothing to fill."""
    outputs, inputs = weight_NK.shape
    pad = (0, -inputs % WIDTH, 0, -outputs % WIDTH)
    return (torch.nn.functional.pad(weight_NK, pad) if any(pad) else weight_NK).contiguous()


def tiled_product(x_TK: Tensor, filled_NK: Tensor) -> Tensor:
    """x · weightᵀ as [T, filled N]."""
    rows = len(x_TK)
    x = _filled(x_TK, rows + -rows % ROWS, filled_NK.shape[1])
    weight_KN = filled_NK.t()
    out = torch.empty(len(x), weight_KN.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, len(x), ROWS):
        torch.mm(x[start : start + ROWS], weight_KN, out=out[start : start + ROWS])
    return out[:rows]


def _filled(x: Tensor, num_rows: int, num_columns: int) -> Tensor:
    if x.shape == (num_rows, num_columns) and x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return torch.nn.functional.pad(x, (0, num_columns - x.shape[1], 0, num_rows - x.shape[0]))
