"""The two branches of a decoder layer and the layer that joins them, as the configuration says.

They know shapes and fields of ModelConfig, and must not know checkpoints' architectures by name.
T tokens, D width, H query heads, G key/value heads, E head width, F rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.api import KV, Batch, Kernels
from shoal.nn.arch import LayerConfig, ModelConfig
from shoal.nn.linear import Linear, load_linear
from shoal.nn.weights import Weights, norm_names


@dataclass(frozen=True, slots=True)
class StepState:
    """What every layer of one step uses."""

    batch: Batch
    kv: KV
    plan: object  # the kernels' own preparation of the batch


class Norm:
    """Root-mean-square norm of the last axis."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str, eps: float) -> None:
        self.kernels, self.eps = kernels, eps
        self.weight_D = weights.norm(name).to(kernels.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight_D, self.eps)

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and that sum."""
        return self.kernels.add_rms_norm(x, residual, self.weight_D, self.eps)


class Attention:
    """Queries, keys and values of one layer, and what they make of the pages."""

    def __init__(
        self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int, table: tuple[Tensor, Tensor] | None
    ) -> None:
        name = f"layers.{index}.self_attn"
        self.kernels, self.config, self.index, self.table = kernels, config, index, table
        self.layer: LayerConfig = config.layers[index]
        parts = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
        self.qkv: Linear = load_linear(kernels, weights, *(f"{name}.{part}" for part in parts))
        self.out: Linear = load_linear(kernels, weights, f"{name}.o_proj")
        self.norms: tuple[Norm, Norm] | None = None
        if config.qk_norm != "none":
            query = Norm(kernels, weights, f"{name}.q_norm", config.norm_eps)
            self.norms = query, Norm(kernels, weights, f"{name}.k_norm", config.norm_eps)

    def __call__(self, x_TD: Tensor, step: StepState) -> Tensor:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        q, k, v = torch.split(self.qkv(x_TD), [queries, keys, keys], dim=1)
        q_THE, k_TGE = self._positioned(q, 0, step), self._positioned(k, 1, step)
        v_TGE = v.reshape(-1, config.num_kv_heads, config.head_dim)
        self.kernels.write_kv(step.kv, self.index, k_TGE, v_TGE, step.batch.slot_T)
        out_THE = self.kernels.attention(
            q_THE, step.kv, self.index, step.plan, config.attention_scale, self.layer.window, config.attention_softcap
        )
        return self.out(out_THE.flatten(1))

    def _positioned(self, x: Tensor, which: int, step: StepState) -> Tensor:
        """Queries (0) or keys (1) as heads, normed and rotated."""
        x = x.contiguous()
        if self.norms and self.config.qk_norm == "width":
            x = self.norms[which](x)
        x = x.view(len(x), -1, self.config.head_dim)
        if self.norms and self.config.qk_norm == "head":
            x = self.norms[which](x)
        return x if self.table is None else self.kernels.rope(x, step.batch.pos_T, *self.table)


class FeedForward:
    """The gated branch: down(act(gate(x)) * up(x))."""

    def __init__(self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int) -> None:
        name = f"layers.{index}.mlp"
        parts = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
        self.gate_up: Linear = load_linear(kernels, weights, *(f"{name}.{part}" for part in parts))
        self.down: Linear = load_linear(kernels, weights, f"{name}.down_proj")
        self.gate = kernels.silu_mul if config.activation == "silu" else kernels.gelu_mul

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(self.gate(self.gate_up(x_TD)))


class Layer:
    """Attention, then feed-forward, each added to the stream; norms before, after, or both."""

    def __init__(
        self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int, table: tuple[Tensor, Tensor] | None
    ) -> None:
        self.scale = config.residual_scale
        self.attention = Attention(kernels, weights, config, index, table)
        self.feed_forward = FeedForward(kernels, weights, config, index)
        norms: list[Norm | None] = [
            Norm(kernels, weights, f"layers.{index}.{name}", config.norm_eps) for name in norm_names(config)
        ]
        if config.norms == "pre":
            norms = [norms[0], None, norms[1], None]
        elif config.norms == "post":
            norms = [None, norms[0], None, norms[1]]
        self.before_attention, self.after_attention, self.before_feed, self.after_feed = norms

    def __call__(self, x_TD: Tensor, step: StepState) -> Tensor:
        """Return the stream after this layer; its keys and values are in the pages."""
        normed = self.before_attention(x_TD) if self.before_attention else x_TD
        branch = self._scaled(self.attention(normed, step), self.after_attention)
        if self.before_feed:
            normed, x_TD = self.before_feed.after_sum(branch, x_TD)
        else:
            x_TD = normed = x_TD + branch
        return x_TD + self._scaled(self.feed_forward(normed), self.after_feed)

    def _scaled(self, branch: Tensor, norm: Norm | None) -> Tensor:
        branch = norm(branch) if norm else branch
        return branch if self.scale == 1.0 else branch * self.scale
