"""A linear layer over whatever form its weight has. It must not know which layer of a model it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.api import Kernels
from shoal.nn.weights import Weights


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight prepared by the kernels that will multiply it."""

    kernels: Kernels
    packed: object

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return [T, N]."""
        return self.kernels.linear(x_TK, self.packed)


def load_linear(kernels: Kernels, weights: Weights, *names: str) -> Linear:
    """Read the named layers as one whose outputs follow each other, with the biases that the checkpoint has."""
    weight_NK = _joined([weights.take(f"{name}.weight") for name in names])
    biased = f"{names[0]}.bias" in weights
    bias_N = _joined([weights.take(f"{name}.bias") for name in names]) if biased else None
    return Linear(kernels, kernels.pack(weight_NK, bias_N))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
