"""Linear layers of a checkpoint, handed to the kernels that will multiply them.

It knows which tensors make one layer, and must not know which layer of a model it is, nor how weights are packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shoal.core.errors import ModelError
from shoal.kernels.api import Activation, Kernels
from shoal.nn.weights import Weights


def load_linear(kernels: Kernels, weights: Weights, *names: str) -> object:
    """Read the named layers as one whose outputs follow each other, with the biases that the checkpoint has.

    ModelError when it is to be quantised and has numbers that are not finite.
    """
    weight_NK, bias_N = _read(weights, names)
    with _named(names):
        return kernels.pack(weight_NK, bias_N, weights.mode)


def load_gated(kernels: Kernels, weights: Weights, activation: Activation, *names: str) -> object:
    """Read a gate and what it lets through, from two layers or from one that holds both. Errors as `load_linear`."""
    weight_2FK, bias_2F = _read(weights, names)
    with _named(names):
        return kernels.pack_gated(weight_2FK, bias_2F, activation, weights.mode)


def load_head(kernels: Kernels, weights: Weights, name: str) -> object:
    """Read the named layer as the head. Errors as `load_linear`."""
    with _named((name,)):
        return kernels.pack(weights.head(name), None, weights.head_mode)


def load_labels(kernels: Kernels, weights: Weights, name: str) -> object:
    """Read a layer of a classifier's head, with its bias where it has one. It is small, and kept in float32."""
    bias_N = weights.whole(f"{name}.bias") if f"{name}.bias" in weights else None
    return kernels.pack(weights.whole(f"{name}.weight"), bias_N)


@contextmanager
def _named(names: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ModelError(f"tensor {', '.join(f'{name}.weight' for name in names)}: {error}") from error


def _read(weights: Weights, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    biased = f"{names[0]}.bias" in weights
    bias_N = _joined([weights.layer_bias(name) for name in names]) if biased else None
    return _joined([weights.layer_weight(name) for name in names]), bias_N


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
