"""The decoder: one class for every supported architecture.

It knows how a step's tokens become hidden states and logits, and must not know what is sampled from them or why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.api import KV, Batch, Kernels
from shoal.nn.adapter import Adapter
from shoal.nn.arch import ModelConfig
from shoal.nn.deltas import Deltas
from shoal.nn.layers import Layer, Norm, StepState
from shoal.nn.linear import load_head, load_labels
from shoal.nn.rope import make_table
from shoal.nn.weights import Weights


class Decoder:
    """A model ready to run on its kernels' device. It holds weights only; keys and values belong to the caller."""

    def __init__(
        self, config: ModelConfig, weights: Weights, kernels: Kernels, adapters: Sequence[Adapter] = (),
        kv_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Batches name adapters by their place in `adapters`; `kv_dtype` is that of keys and values in memory, None
        takes the activations'."""
        self.config = config
        self.kernels = kernels
        self.dtype = weights.dtype
        self.kv_dtype = kv_dtype or weights.dtype
        tables = rope_tables(config, kernels.device)
        self.embedding_VD = weights.take("embed_tokens.weight").to(kernels.device)
        self.layers = [
            Layer(kernels, weights, config, index, None if layer.rope is None else tables[layer.rope])
            for index, layer in enumerate(config.layers)
        ]
        self.whole = [kernels.prepare_layer(layer.parts) for layer in self.layers]  # as the kernels take them
        self.deltas = Deltas(kernels, config, adapters, [layer.linears for layer in self.layers])
        self.norm = Norm(kernels, weights, "norm", config.norm_eps)
        if config.labels:
            self.head = load_labels(kernels, weights, "score")
        elif config.tied and weights.head_mode == "plain":
            self.head = kernels.pack(self.embedding_VD)
        else:
            self.head = load_head(kernels, weights, "embed_tokens" if config.tied else "lm_head")

    def new_kv(self, num_pages: int, page_size: int) -> KV:
        """Pages for this model's keys and values."""
        config = self.config
        return self.kernels.new_kv(
            config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, self.kv_dtype
        )

    def forward(self, batch: Batch, kv: KV, begun: Callable[[], None] = lambda: None) -> Tensor:
        """Write the step's keys and values; return the wanted positions' hidden states as [R, D], after the norm.

        Of the last layer the other positions leave keys and values, and nothing else is computed of them. `begun` is
        called when all is laid out and nothing but the kernels' work is left.
        """
        x_TD = embed(self.kernels, self.config, self.embedding_VD, batch.ids_T)
        adapted = None if batch.adapter_T is None else self.deltas.of(batch.adapter_T)
        step = StepState(batch, kv, self.kernels.plan(batch, kv), adapted=adapted)
        begun()
        if batch.wanted is None:
            x_TD = self._through(len(self.layers), x_TD, step)
            return self.norm(x_TD if len(batch.out_R) == len(x_TD) else x_TD.index_select(0, batch.out_R))
        x_TD = self._through(len(self.layers) - 1, x_TD, step)
        plan = self.kernels.plan(batch.wanted, kv) if len(batch.out_R) else None
        return self.norm(self.layers[-1](x_TD, StepState(batch, kv, plan, batch.out_R, adapted)))

    def _through(self, count: int, x_TD: Tensor, step: StepState) -> Tensor:
        """The stream after the first layers: by one call if the kernels have one for them and no row has an adapter."""
        whole = [each for each in self.whole[:count] if each is not None]
        if count and len(whole) == count and step.adapted is None:
            done = self.kernels.layers(x_TD, whole, step.kv, 0, step.batch, step.plan)
            if done is not None:
                return done
        for layer in self.layers[:count]:
            x_TD = layer(x_TD, step)
        return x_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return float32 [R, V], or a classifier's numbers as [R, labels]."""
        if self.config.labels:
            return self.kernels.logits(hidden_RD.float(), self.head)
        logits = self.kernels.logits(hidden_RD, self.head)
        if self.config.logit_divisor != 1.0:
            logits = logits / self.config.logit_divisor
        if self.config.logit_softcap:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits


def rope_tables(config: ModelConfig, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Cosine and sine of every kind of rotation that the layers use."""
    tables = []
    for rope in config.ropes:
        cos, sin = make_table(rope, config.context)
        tables.append((cos.to(device), sin.to(device)))
    return tables


def embed(kernels: Kernels, config: ModelConfig, embedding_VD: Tensor, ids_T: Tensor) -> Tensor:
    """What goes into the first layer, [T, D]."""
    x_TD = kernels.embedding(ids_T, embedding_VD)
    if config.embedding_scale == 1.0:
        return x_TD
    # The factor is rounded to the model's dtype first: checkpoints were trained that way.
    return x_TD * torch.tensor(config.embedding_scale, dtype=x_TD.dtype, device=x_TD.device)
