"""The two branches of a decoder layer and the layer that joins them, as the configuration says.

They know shapes and fields of ModelConfig, and must not know checkpoints' architectures by name.
T tokens, D width, H query heads, G key/value heads, E head width, F rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from shoal.kernels.api import KV, Batch, Heads, Kernels, LayerParts
from shoal.nn.arch import LayerConfig, ModelConfig
from shoal.nn.deltas import Adapted, Site
from shoal.nn.linear import load_gated, load_linear
from shoal.nn.weights import Weights, norm_names


@dataclass(frozen=True, slots=True)
class StepState:
    """What every layer of one step uses."""

    batch: Batch
    kv: KV
    plan: object  # the kernels' own preparation of the batch, or of the rows that go on
    only_R: Tensor | None = None  # rows that go on once keys and values are placed, for which the plan is; None: all
    adapted: Adapted | None = None  # None: no row has an adapter


class Norm:
    """Root-mean-square norm of the last axis."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str, eps: float) -> None:
        self.kernels, self.eps = kernels, eps
        self.weight_D = weights.norm(name).to(kernels.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight_D, self.eps)


class Attention:
    """Queries, keys and values of one layer, and what they make of the pages."""

    def __init__(
        self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int, table: tuple[Tensor, Tensor] | None
    ) -> None:
        name = f"layers.{index}.self_attn"
        self.kernels, self.config, self.index = kernels, config, index
        self.layer: LayerConfig = config.layers[index]
        parts = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
        self.qkv = load_linear(kernels, weights, *(f"{name}.{part}" for part in parts))
        self.out = load_linear(kernels, weights, f"{name}.o_proj")
        norms = None
        if config.qk_norm != "none":
            found = [weights.norm(f"{name}.{part}_norm").to(kernels.device) for part in ("q", "k")]
            norms = found[0], found[1]
        self.heads = kernels.prepare_heads(
            Heads(
                num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, table=table,
                norms=norms, whole=config.qk_norm == "width", eps=config.norm_eps,
            )
        )  # fmt: skip

    def place(self, x_TD: Tensor, step: StepState) -> Tensor:
        """Write the rows' keys and values; return their queries, [T, H, E]."""
        qkv_TW = self.kernels.linear(x_TD, self.qkv)
        if step.adapted is not None:
            step.adapted.add(self.index, "qkv", x_TD, qkv_TW)
        return self.kernels.place(qkv_TW, self.heads, step.kv, self.index, step.batch)

    def __call__(self, q_THE: Tensor, step: StepState, residual_TD: Tensor | None, factor: float) -> Tensor:
        config = self.config
        out_THE = self.kernels.attention(
            q_THE, step.kv, self.index, step.plan, config.attention_scale, self.layer.window, config.attention_softcap
        )
        heads_TW = out_THE.flatten(1)
        out_TD = self.kernels.linear(heads_TW, self.out, residual_TD, factor)
        if step.adapted is not None:
            step.adapted.add(self.index, "out", heads_TW, out_TD, factor)
        return out_TD


class FeedForward:
    """The gated branch: down(act(gate(x)) * up(x))."""

    def __init__(self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int) -> None:
        name = f"layers.{index}.mlp"
        parts = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
        self.kernels, self.index = kernels, index
        self.gate_up = load_gated(kernels, weights, config.activation, *(f"{name}.{part}" for part in parts))
        self.down = load_linear(kernels, weights, f"{name}.down_proj")

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor | None, factor: float, adapted: Adapted | None = None
    ) -> Tensor:
        if adapted is None:
            return self.kernels.linear(self.kernels.gated(x_TD, self.gate_up), self.down, residual_TD, factor)
        inner_TF = adapted.gated(self.index, x_TD, self.gate_up)
        out_TD = self.kernels.linear(inner_TF, self.down, residual_TD, factor)
        adapted.add(self.index, "down", inner_TF, out_TD, factor)
        return out_TD


class Layer:
    """Attention, then feed-forward, each added to the stream; norms before, after, or both."""

    def __init__(
        self, kernels: Kernels, weights: Weights, config: ModelConfig, index: int, table: tuple[Tensor, Tensor] | None
    ) -> None:
        self.kernels, self.scale = kernels, config.residual_scale
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

    @property
    def linears(self) -> dict[Site, object]:
        """The packed linear layers, to which adapters add."""
        attention, feed = self.attention, self.feed_forward
        return {"qkv": attention.qkv, "out": attention.out, "gate_up": feed.gate_up, "down": feed.down}

    @property
    def parts(self) -> LayerParts:
        """All of this layer, for kernels that take a whole one."""
        attention, feed, config = self.attention, self.feed_forward, self.attention.config
        norms = (self.before_attention, self.after_attention, self.before_feed, self.after_feed)
        first, second, third, fourth = (None if norm is None else norm.weight_D for norm in norms)
        return LayerParts(
            (first, second, third, fourth), config.norm_eps, attention.qkv, attention.heads, attention.out,
            feed.gate_up, feed.down, config.attention_scale, attention.layer.window, config.attention_softcap,
            self.scale,
        )  # fmt: skip

    def __call__(self, x_TD: Tensor, step: StepState) -> Tensor:
        """Return the stream after this layer, of the rows that go on; keys and values of all are in the pages."""
        normed = self.before_attention(x_TD) if self.before_attention else x_TD
        q_THE = self.attention.place(normed, step)
        if step.only_R is not None:
            x_TD, q_THE = x_TD.index_select(0, step.only_R), q_THE.index_select(0, step.only_R)
            if not len(x_TD):
                return x_TD
            if step.adapted is not None:
                step = replace(step, adapted=step.adapted.take(step.only_R))
        if self.after_attention:
            branch = self.after_attention(self.attention(q_THE, step, None, 1.0))
            x_TD = self.kernels.add(x_TD, branch, self.scale)
        else:
            x_TD = self.attention(q_THE, step, x_TD, self.scale)
        normed = self.before_feed(x_TD) if self.before_feed else x_TD
        if self.after_feed:
            branch = self.after_feed(self.feed_forward(normed, None, 1.0, step.adapted))
            return self.kernels.add(x_TD, branch, self.scale)
        return self.feed_forward(normed, x_TD, self.scale, step.adapted)
