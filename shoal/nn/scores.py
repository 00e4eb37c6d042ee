"""Log-probabilities, ranks and best tokens of rows of logits, in the engine's words.

It knows how a sum of integer weights becomes a logarithm. It must not know requests, choose a token, nor reduce a row:
the kernels do that.

R = rows, S = rows asked about, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from shoal.core.types import TokenScore
from shoal.kernels import WEIGHT_BITS, Kernels

_UNIT = WEIGHT_BITS * math.log(2)


def score(
    kernels: Kernels, logits_RV: torch.Tensor, tokens: Sequence[int], top: int, rows: Sequence[int] | None = None
) -> list[TokenScore]:
    """Log-probability under softmax, rank (1 is best; of equals the lowest id first) and `top` best tokens, of one
    token in each of those rows, or in every row. Logits are float32 and contiguous.

    A row whose logits are not numbers gives not-a-number log-probabilities, never an error.
    """
    row_S = torch.tensor(range(len(tokens)) if rows is None else rows, dtype=torch.int64, device=logits_RV.device)
    token_S = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
    found = kernels.score(logits_RV, row_S, token_S, min(top, logits_RV.shape[1]))
    bests = found.best_S.tolist()
    # the sum of a good row is at least 2**40; a row with a NaN may sum to anything
    logs = [math.log(weight) - _UNIT if weight > 0 else math.nan for weight in found.weight_S.tolist()]
    columns = (tokens, found.value_S.tolist(), found.rank_S.tolist(), bests, logs)
    tops = (found.top_id_SK.tolist(), found.top_value_SK.tolist())
    return [
        TokenScore(
            token, value - best - log, rank, tuple([(i, v - best - log) for i, v in zip(ids, values, strict=True)])
        )
        for token, value, rank, best, log, ids, values in zip(*columns, *tops, strict=True)
    ]
