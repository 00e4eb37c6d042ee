"""Chooses, from a few rows of tokens, how the inputs of layers are scaled before their weights are quantised.

An input that is large on average makes its column of the weight matter more. Multiplying that column by a factor, and
dividing what makes the input by the same, changes nothing in exact arithmetic, but gives the column finer steps (the
idea of activation-aware quantisation, Lin et al., arXiv 2306.00978). The factor is the mean magnitude of the input to a
power, which is searched for each layer with the kernels that will be used. It must not know how weights are packed, nor
where the rows come from.

What makes an input is the norm before it, the layer that gives the values (for the attention's output), or the half of
the gate that is let through (for the last layer of a branch). So nothing is left to do when the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from shoal.kernels.api import Batch, Kernels, Mode
from shoal.nn.arch import ModelConfig
from shoal.nn.decoder import embed, rope_tables
from shoal.nn.layers import Layer, StepState
from shoal.nn.weights import Folding, Weights, norm_names

POWERS = tuple(step / 10 for step in range(10))  # 0 leaves a layer as it is
PAGE = 64  # tokens
MOST = 1024  # tokens: more say little more about means
JUDGED = 256  # of them, evenly spread, on which errors are compared


@torch.inference_mode()
def calibrate(
    config: ModelConfig, weights: Weights, kernels: Kernels, rows: Sequence[Sequence[int]], mode: Mode
) -> Folding:
    """Read the rows' first tokens (at most MOST) with plain weights, layer by layer, and choose each layer's factors.

    The result is a function of the arguments: the kernels' numbers do not depend on threads, sums over so few bf16
    numbers are exact in float64, and factors are rounded to bf16.
    """
    batch, num_pages = _batch(rows, kernels)
    tables = rope_tables(config, kernels.device)
    kv = kernels.new_kv(config.num_layers, num_pages, PAGE, config.num_kv_heads, config.head_dim, weights.dtype)
    step = StepState(batch, kv, kernels.plan(batch, kv))
    x_TD = embed(kernels, config, weights.take("embed_tokens.weight").to(kernels.device), batch.ids_T)
    chosen = _Chosen(config, weights, kernels, mode)
    for index, layer in enumerate(config.layers):
        watch = _Watch(kernels)
        table = None if layer.rope is None else tables[layer.rope]
        x_TD = Layer(cast(Kernels, watch), weights, config, index, table)(x_TD, step)
        chosen.choose(index, *watch.inputs)
    return chosen.folding


def _batch(rows: Sequence[Sequence[int]], kernels: Kernels) -> tuple[Batch, int]:
    """The rows as one step, each in pages of its own, and the number of pages."""
    kept: list[list[int]] = []
    for row in rows:
        ids = list(row)[: MOST - sum(map(len, kept))]
        if ids:
            kept.append(ids)
    if not kept:
        raise ValueError("there are no tokens to calibrate with")
    lengths = torch.tensor([len(ids) for ids in kept])
    pages = -(-lengths // PAGE)
    first = pages.cumsum(0) - pages
    table = first[:, None] + torch.arange(int(pages.max()))  # what lies beyond a row's pages is never read
    pos = torch.cat([torch.arange(len(ids)) for ids in kept])
    slot = torch.cat([torch.arange(len(ids)) + int(at) * PAGE for ids, at in zip(kept, first, strict=True)])
    tokens = torch.tensor([token for row in kept for token in row])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    table = table.clamp_(max=int(pages.sum()) - 1).to(torch.int32)
    tensors = (tokens, pos, slot, start, table, lengths, start[1:] - 1)
    return Batch(*(tensor.to(kernels.device).contiguous() for tensor in tensors)), int(pages.sum())


class _Watch:
    """Kernels that keep what goes into the linear layers: of qkv, of the output, of the gate, of the last."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.inputs: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def linear(self, x_TK: Tensor, *rest: Any) -> Tensor:
        """Keep x, and pass it on."""
        self.inputs.append(x_TK)
        return self._kernels.linear(x_TK, *rest)

    def gated(self, x_TK: Tensor, packed: object) -> Tensor:
        """Keep x, and pass it on."""
        self.inputs.append(x_TK)
        return self._kernels.gated(x_TK, packed)


@dataclass
class _Chosen:
    """The factors chosen so far."""

    config: ModelConfig
    weights: Weights
    kernels: Kernels
    mode: Mode
    folding: Folding = field(default_factory=lambda: Folding({}, {}, {}))

    def choose(self, index: int, qkv_in: Tensor, out_in: Tensor, gate_in: Tensor, down_in: Tensor) -> None:
        """One layer's factors, from what goes into its linear layers."""
        config, name, fold = self.config, f"layers.{index}", self.folding
        qkv = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
        if config.norms != "post":  # then it is the stream itself that goes in
            before = norm_names(config)
            for x, norm, part, members in (
                (qkv_in, before[0], "self_attn", qkv),
                (gate_in, before[1 if config.norms == "pre" else 2], "mlp", gate_up),
            ):
                factors = self._search(x, *(f"{name}.{part}.{member}" for member in members))
                fold.norms[f"{name}.{norm}"] = factors
        group = config.num_heads // config.num_kv_heads
        values = self._search(out_in, f"{name}.self_attn.o_proj", heads=(config.num_kv_heads, group, config.head_dim))
        values = values.view(config.num_kv_heads, group, -1)[:, 0].flatten()
        inner = self._search(down_in, f"{name}.mlp.down_proj")
        if config.fused:
            ones = torch.ones((config.num_heads + config.num_kv_heads) * config.head_dim)
            values, inner = torch.cat([ones, values]), torch.cat([torch.ones_like(inner), inner])
        fold.rows[f"{name}.self_attn.{qkv[-1]}"] = values
        fold.rows[f"{name}.mlp.{gate_up[-1]}"] = inner

    def _search(self, x_TK: Tensor, *names: str, heads: tuple[int, int, int] | None = None) -> Tensor:
        """The factors, float32 [K], with which the layers' outputs are nearest to the plain ones; noted for `names`.

        Errors are relative to each row's own size: a few rows, such as the first of a text, are often far larger.
        With `heads` (key/value heads, queries for each, width), queries of one key/value head have the same factors.
        """
        mean_K = x_TK.double().abs().mean(0)
        if heads:
            mean_K = mean_K.view(heads).mean(1, keepdim=True).expand(heads).flatten()
        x = x_TK[:: -(-len(x_TK) // JUDGED)].contiguous()
        weight = torch.cat([self.weights.take(f"{name}.weight") for name in names]).to(self.kernels.device)
        truth = self.kernels.logits(x, self.kernels.pack(weight))
        size_T = truth.double().square().sum(1).clamp(min=1e-30)
        best, least = torch.ones(x.shape[1]), float("inf")
        for power in POWERS:
            factors = _factors(mean_K, power)
            packed = self.kernels.pack(weight.float() * factors, None, self.mode)
            found = self.kernels.logits((x.float() / factors).to(x.dtype), packed)
            error = float(((found - truth).double().square().sum(1) / size_T).sum())
            if error < least:
                best, least = factors, error
        for name in names:
            self.folding.columns[name] = best.cpu()
        return best.cpu()


def _factors(mean_K: Tensor, power: float) -> Tensor:
    """The means to a power, about 1 in the middle, as float32 numbers that bf16 holds; 1 for inputs always zero."""
    raised = mean_K.clamp(min=1e-8) ** power
    raised = raised / (raised.amax() * raised.amin()).sqrt()
    return torch.where(mean_K > 0, raised, 1.0).bfloat16().float()
