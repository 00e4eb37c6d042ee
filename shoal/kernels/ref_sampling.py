"""The specification of what sampling needs of rows of logits: weights, draws, and places of tokens in their rows.

It knows how to reduce a row so that the result has one value on every device and in any company. It must not know
requests, nor make random numbers.

A number's weight is e to the power of (x - largest) / heat in units of 2**-40, rounded down. Sums of weights are of
integers, and the exponential is made of single additions, multiplications and divisions, each of which has one correct
result: csrc/sampling.cpp takes the same ones in the same order, and finds the same bits.

S = rows that draw or are scored, V = vocabulary, K = best tokens asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.kernels.api import WEIGHT_BITS, Draws, Scores

_BYTES = 16 << 20  # logits worked on at a time; they need about six times as much beside them
_MINUS_INFINITY = float("-inf")


def exponential(z_SV: Tensor) -> Tensor:
    """e to the power of float32 values <= 0, to 1e-7 of it; below -80 and for a NaN something too small to matter.

    ln 2 comes in two parts, so that what is left of z loses no digits; the polynomial is a minimax fit for that rest.
    """
    z = torch.where(z_SV > -80, z_SV, -80.0)
    whole = torch.round(z * 1.44269504)
    f = (z - whole * 0.693359375) - whole * -2.12194440e-4
    q = f * 0.0013814539 + 0.008368745
    q = q * f + 0.04166839
    q = q * f + 0.16666521
    q = q * f + 0.49999994
    p = (q * (f * f) + f) + 1
    return (p.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)


def integer_weights(e_SV: Tensor) -> Tensor:
    """Relative probabilities as int64, 2**40 for 1.0: their sum has one value whatever the order of adding."""
    return (e_SV * float(1 << WEIGHT_BITS)).to(torch.int64)


# -- draws --------------------------------------------------------------------------------------------


def draw(x_RV: Tensor, draws: Draws) -> Tensor:
    """`Kernels.draw`: the inverse of the cumulated weights, in the order of token ids."""
    size = max(1, _BYTES // (4 * x_RV.shape[1]))
    rows = range(0, len(draws.row_S), size)
    found = [_draw(x_RV, draws, slice(first, first + size)) for first in rows]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=x_RV.device)


def _draw(x_RV: Tensor, draws: Draws, part: slice) -> Tensor:
    x_SV = x_RV[draws.row_S[part]]
    z_SV = (x_SV - draws.best_S[part, None]) / draws.heat_S[part, None]
    top_k, top_p = draws.top_k_S[part].tolist(), draws.top_p_S[part].tolist()
    e_SV = exponential(z_SV)
    kept_SV = (z_SV >= _edge(z_SV, top_k, top_p)) & (e_SV >= draws.min_p_S[part, None])
    sum_SV = integer_weights(e_SV).masked_fill_(~kept_SV, 0).cumsum(dim=1)
    places = [
        number % (1 << 64) * total >> 64
        for number, total in zip(draws.number_S[part].tolist(), sum_SV[:, -1].tolist(), strict=True)
    ]
    place_S1 = torch.tensor(places, dtype=torch.int64, device=x_SV.device)[:, None]
    return torch.searchsorted(sum_SV, place_S1, right=True)[:, 0]


def _edge(z_SV: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """The smallest value within each row's top-k and, of what that leaves, top-p, as [S, 1].

    top-p is the shortest run of best tokens whose weight reaches that share of the whole; the best is always in it.
    """
    last = z_SV.shape[1] - 1
    edge_S1 = torch.full((len(z_SV), 1), _MINUS_INFINITY, device=z_SV.device)
    if all(k == 0 or k > last for k in top_k) and min(top_p) >= 1:
        return edge_S1
    value_SV = z_SV.sort(dim=1, descending=True).values
    ranks = [min(k - 1, last) if k > 0 else last for k in top_k]
    edge_S1 = value_SV.gather(1, torch.tensor(ranks, device=z_SV.device)[:, None])
    sum_SV = integer_weights(exponential(value_SV)).masked_fill_(value_SV < edge_S1, 0).cumsum(dim=1)
    limits = [
        min(math.ceil(p * total), total) if p < 1 else total
        for p, total in zip(top_p, sum_SV[:, -1].tolist(), strict=True)
    ]
    limit_S1 = torch.tensor(limits, dtype=torch.int64, device=z_SV.device)[:, None]
    short_S1 = (sum_SV < limit_S1).sum(dim=1, keepdim=True)
    # where top-p keeps all, its run ends at the last token of any weight, and lighter ones are nobody's anyway
    return torch.maximum(edge_S1, value_SV.gather(1, short_S1))


# -- scores -------------------------------------------------------------------------------------------


def score(x_RV: Tensor, row_S: Tensor, token_S: Tensor, top: int) -> Scores:
    """`Kernels.score`."""
    size = max(1, _BYTES // (4 * x_RV.shape[1]))
    starts = range(0, max(1, len(row_S)), size)
    parts = [_score(x_RV[row_S[first : first + size]], token_S[first : first + size], top) for first in starts]
    fields = zip(*parts, strict=True)
    return Scores(*(torch.cat(each) for each in fields))


def _score(x_SV: Tensor, token_S: Tensor, top: int) -> tuple[Tensor, ...]:
    best_S1 = x_SV.max(dim=1, keepdim=True).values
    value_S1 = x_SV.gather(1, token_S[:, None])
    weight_S = integer_weights(exponential(x_SV - best_S1)).sum(dim=1)
    before_SV = torch.arange(x_SV.shape[1], device=x_SV.device) < token_S[:, None]
    rank_S = (x_SV > value_S1).sum(dim=1) + ((x_SV == value_S1) & before_SV).sum(dim=1) + 1
    id_SK = x_SV.sort(dim=1, descending=True, stable=True).indices[:, :top] if top else token_S.new_empty(len(x_SV), 0)
    return best_S1[:, 0], value_S1[:, 0], weight_S, rank_S, id_SK, x_SV.gather(1, id_SK)
