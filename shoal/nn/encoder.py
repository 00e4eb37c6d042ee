"""The encoder: whole texts to one vector each, all tokens of a step in one matrix and no padding between them.

It knows how tokens become hidden states and these a vector, and must not know what asked for them. It keeps no keys and
values: a text is computed at once or not at all. Of a second segment's words it is told by their numbers, which come
after all of the vocabulary's.

T tokens, D width, N texts, L tokens of texts of one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.api import Kernels
from shoal.nn.encoder_arch import EncoderConfig
from shoal.nn.linear import load_labels, load_linear
from shoal.nn.weights import Weights

Pooling = Literal["mean", "cls", "last"]
LEAST_NORM = 1e-12  # a vector shorter than this is divided by this, as torch's normalize does


class Encoder:
    """A model ready to run on its kernels' device. `normalize` makes every vector one of length 1; a classifier's are
    the numbers that its head makes of the pooled ones."""

    def __init__(
        self, config: EncoderConfig, weights: Weights, kernels: Kernels, pooling: Pooling, normalize: bool
    ) -> None:
        self.config, self.kernels = config, kernels
        self.pooling, self.normalize = pooling, normalize
        tables = [weights.take(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")]
        self.words_VD = tables[0].to(kernels.device)
        kinds_KD = tables[2][: config.used_kinds]
        self.places_QD = (tables[1] + kinds_KD[:, None]).flatten(0, 1).to(kernels.device)  # Q: kinds times positions
        self.norm = _Norm(kernels, weights, "embeddings.LayerNorm", config.norm_eps)
        self.layers = [_Layer(kernels, weights, config, f"encoder.layer.{i}") for i in range(config.num_layers)]
        self.head = _Head(kernels, weights, config) if config.labels else None

    def forward(self, ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the vectors of texts that follow each other in T, as float32 [N, D or labels]. None is empty.

        It is fastest where equal lengths stand together.
        """
        config = self.config
        kind_T, word_T = ids_T // config.vocab_size, ids_T % config.vocab_size
        pos_T = torch.cat([torch.arange(length) for length in lengths]).to(ids_T.device) + config.begin
        place_T = kind_T * config.positions + pos_T
        x_TD = self.kernels.embedding(word_T, self.words_VD) + self.kernels.embedding(place_T, self.places_QD)
        x_TD = self.norm(x_TD)
        for layer in self.layers:
            x_TD = layer(x_TD, lengths)
        vectors_ND = torch.cat([self._pool(rows_NLD.float()) for rows_NLD in _by_length(x_TD, lengths)])
        if self.head is not None:
            return self.head(vectors_ND)
        if not self.normalize:
            return vectors_ND
        return vectors_ND / _fold(vectors_ND * vectors_ND, 1).sqrt().clamp_min(LEAST_NORM)[:, None]

    def _pool(self, rows_NLD: Tensor) -> Tensor:
        if self.pooling == "mean":
            return _fold(rows_NLD, 1) / rows_NLD.shape[1]
        return rows_NLD[:, 0 if self.pooling == "cls" else -1]


class _Norm:
    """Layer norm of the last axis."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str, eps: float) -> None:
        self.kernels, self.eps = kernels, eps
        self.weight_D = weights.norm(name).to(kernels.device)
        self.bias_D = weights.layer_bias(name).float().to(kernels.device)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.kernels.layer_norm(x_TD, self.weight_D, self.bias_D, self.eps)


class _Layer:
    """Attention, then feed-forward, each added to the stream and normed."""

    def __init__(self, kernels: Kernels, weights: Weights, config: EncoderConfig, name: str) -> None:
        self.kernels, self.config = kernels, config
        parts = (f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
        self.qkv = load_linear(kernels, weights, *parts)
        self.out = load_linear(kernels, weights, f"{name}.attention.output.dense")
        self.up = load_linear(kernels, weights, f"{name}.intermediate.dense")
        self.down = load_linear(kernels, weights, f"{name}.output.dense")
        self.after_attention = _Norm(kernels, weights, f"{name}.attention.output.LayerNorm", config.norm_eps)
        self.after_feed = _Norm(kernels, weights, f"{name}.output.LayerNorm", config.norm_eps)

    def __call__(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        kernels, config = self.kernels, self.config
        qkv_TW = kernels.linear(x_TD, self.qkv)
        heads_TD = kernels.attention_within(qkv_TW, config.num_heads, lengths, config.attention_scale)
        x_TD = self.after_attention(kernels.linear(heads_TD, self.out, x_TD))
        inner_TF = kernels.gelu(kernels.linear(x_TD, self.up))
        return self.after_feed(kernels.linear(inner_TF, self.down, x_TD))


class _Head:
    """A layer under tanh, and one that makes a number of each label, both in float32."""

    def __init__(self, kernels: Kernels, weights: Weights, config: EncoderConfig) -> None:
        self.kernels = kernels
        self.dense, self.out = (load_labels(kernels, weights, name) for name in config.head)

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        inner_ND = self.kernels.linear(vectors_ND, self.dense)
        # Row by row: torch does not promise that a number's tanh is the same wherever it stands in a tensor.
        return self.kernels.logits(torch.stack([row_D.tanh() for row_D in inner_ND]), self.out)


def _by_length(x_TD: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Neighbours of one length as [N, L, D]."""
    first = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        yield x_TD[first : first + count * length].view(count, length, -1)
        first += count * length


def _fold(x: Tensor, axis: int) -> Tensor:
    """Sum over an axis by adding its second half to its first until one is left: the same sums in any company."""
    while x.shape[axis] > 1:
        half, odd = divmod(x.shape[axis], 2)
        folded = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
        x = torch.cat([folded, x.narrow(axis, 2 * half, 1)], dim=axis) if odd else folded
    return x.squeeze(axis)
