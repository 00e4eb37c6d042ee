"""What adapters add inside a decoder: packed for each layer once, and for the rows of a step that have one.

It knows the layers' linears by name and adapters by number; it must not know requests, nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.api import Delta, Kernels, Up
from shoal.nn.adapter import Adapter
from shoal.nn.arch import ModelConfig

Site = Literal["qkv", "out", "gate_up", "down"]
"""The packed linears of a layer."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """The rows of one step that have an adapter, and what is added to them in each layer."""

    kernels: Kernels
    layers: Sequence[Mapping[Site, object]]  # packed; a site is not there where no adapter adds anything
    adapter_T: Tensor
    grouped: object  # the kernels' own form of it

    def add(self, layer: int, site: Site, x_TK: Tensor, y_TN: Tensor, factor: float = 1.0) -> None:
        """Add to the outputs of a linear layer, in place, what the rows' adapters make of its inputs."""
        deltas = self.layers[layer].get(site)
        if deltas is not None:
            self.kernels.add_deltas(x_TK, y_TN, deltas, self.grouped, factor)

    def gated(self, layer: int, x_TK: Tensor, packed: object) -> Tensor:
        """What a gated layer gives with what adapters add before its activation."""
        deltas = self.layers[layer].get("gate_up")
        if deltas is None:
            return self.kernels.gated(x_TK, packed)
        return self.kernels.gated_with(x_TK, packed, deltas, self.grouped)

    def take(self, rows: Tensor) -> Adapted | None:
        """The same for a selection of the step's rows; None where none of them has an adapter."""
        adapter_R = self.adapter_T.index_select(0, rows)
        if not bool((adapter_R >= 0).any()):
            return None
        return Adapted(self.kernels, self.layers, adapter_R, self.kernels.group(adapter_R))


class Deltas:
    """All adapters of a decoder, by number."""

    def __init__(
        self, kernels: Kernels, config: ModelConfig, adapters: Sequence[Adapter],
        linears: Sequence[Mapping[Site, object]],
    ) -> None:  # fmt: skip
        """`linears` are the decoder's packed layers, to which adapters add."""
        self._kernels = kernels
        self._layers: list[dict[Site, object]] = []
        for index, sites in enumerate(linears):
            packed: dict[Site, object] = {}
            for site, linear in sites.items():
                found = [_delta(adapter, config, index, site) for adapter in adapters]
                if any(each is not None for each in found):
                    packed[site] = kernels.pack_deltas(found, linear)
            self._layers.append(packed)

    def of(self, adapter_T: Tensor) -> Adapted:
        """What is added in a step whose rows have these adapters, -1 for none."""
        return Adapted(self._kernels, self._layers, adapter_T, self._kernels.group(adapter_T))


def _delta(adapter: Adapter, config: ModelConfig, index: int, site: Site) -> Delta | None:
    """What an adapter adds to one packed linear, which may be several of the checkpoint's side by side."""
    downs: list[Tensor] = []
    ups: list[Up] = []
    begin = first = 0
    for name, outputs in _parts(config, site):
        found = adapter.take(f"layers.{index}.{name}")
        if found is not None:
            # A checkpoint's gate and rest in one tensor are two sides of a gated layer.
            sides = found.up_NR.split(config.inner) if site == "gate_up" else (found.up_NR,)
            place = first
            for side_NR in sides:
                ups.append(Up(side_NR.contiguous(), found.scale, begin, place))
                place += len(side_NR)
            downs.append(found.down_RK)
            begin += len(found.down_RK)
        first += outputs
    return Delta(torch.cat(downs), tuple(ups)) if downs else None


def _parts(config: ModelConfig, site: Site) -> list[tuple[str, int]]:
    """The checkpoint's layers in a packed one, in order, with their outputs."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if site == "qkv" and config.fused:
        return [("self_attn.qkv_proj", queries + 2 * keys)]
    if site == "gate_up" and config.fused:
        return [("mlp.gate_up_proj", 2 * config.inner)]
    return {
        "qkv": [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
        "out": [("self_attn.o_proj", config.width)],
        "gate_up": [("mlp.gate_proj", config.inner), ("mlp.up_proj", config.inner)],
        "down": [("mlp.down_proj", config.width)],
    }[site]
