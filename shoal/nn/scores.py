"""Log-probabilities, ranks and best tokens of rows of logits.

It knows how to reduce a row so that the result cannot depend on the other rows, on threads or on the device's way to
split work. It must not know requests, nor choose a token.

R = rows, V = vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from shoal.core.types import TokenScore

SCALE_BITS = 40  # weights are multiples of 2**-40 of the best token's; 2**22 of them cannot overflow 63 bits


def exponential(z_RV: torch.Tensor) -> torch.Tensor:
    """exp of float32 values <= 0, the same for a value wherever in the tensor it stands.

    On a host it is numpy's: torch hands the end of each thread's share to another, scalar routine, and so the last
    bit of a value would depend on the number of rows and threads.
    """
    if z_RV.device.type == "cpu":
        return torch.from_numpy(np.exp(z_RV.contiguous().numpy()))
    return torch.exp(z_RV)


def descending(x_RV: torch.Tensor) -> torch.Tensor:
    """The values of each row, largest first. On a host numpy sorts many times faster than torch."""
    if x_RV.device.type == "cpu":
        return torch.from_numpy(-np.sort(-x_RV.numpy(), axis=1))
    return torch.sort(x_RV, dim=1, descending=True).values


def integer_weights(e_RV: torch.Tensor) -> torch.Tensor:
    """Relative probabilities as int64, 2**40 for 1.0: their sum has one value whatever the order of adding."""
    return (e_RV * float(1 << SCALE_BITS)).to(torch.int64)


def score(logits_RV: torch.Tensor, tokens: list[int], top: int) -> list[TokenScore]:
    """Log-probability under softmax, rank (1 is best; of equals the lowest id first) and `top` best tokens, per row.

    A row whose logits are not numbers gives not-a-number log-probabilities, never an error.
    """
    token_R = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
    value_R1 = logits_RV.gather(1, token_R[:, None])
    best_R1 = logits_RV.max(dim=1, keepdim=True).values
    sums = integer_weights(exponential(logits_RV - best_R1)).sum(dim=1).tolist()
    below_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) < token_R[:, None]
    rank_R = (logits_RV > value_R1).sum(dim=1) + ((logits_RV == value_R1) & below_RV).sum(dim=1) + 1
    bests = best_R1[:, 0].tolist()
    # the sum of a good row is at least 2**40; a row with a NaN may sum to anything
    logs = [math.log(s) - SCALE_BITS * math.log(2) if s > 0 else math.nan for s in sums]
    tops = _best(logits_RV, top) if top > 0 else [()] * len(tokens)
    rows = zip(tokens, value_R1[:, 0].tolist(), bests, logs, rank_R.tolist(), tops, strict=True)
    return [
        TokenScore(token, value - best - log, rank, tuple((i, v - best - log) for i, v in pairs))
        for token, value, best, log, rank, pairs in rows
    ]


def _best(logits_RV: torch.Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    """The `top` largest (id, logit) of each row; of equals the lowest id first."""
    top = min(top, logits_RV.shape[1])
    value_RK, id_RK = torch.topk(logits_RV, top, dim=1)
    crowded = (
        (logits_RV >= value_RK[:, -1:]).sum(dim=1) > top
    ).tolist()  # which of its equals topk kept is not defined
    result = []
    for row, (values, ids) in enumerate(zip(value_RK.tolist(), id_RK.tolist(), strict=True)):
        if crowded[row]:
            index = (logits_RV[row] >= value_RK[row, -1]).nonzero()[:, 0]
            values, ids = logits_RV[row, index].tolist(), index.tolist()
        pairs = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        result.append(tuple(pairs[:top]))
    return result
