"""What the compiled kernels keep of a model: weights, heads and whole layers, with the tensors whose addresses the
extension holds.

It knows who owns which memory. It must not know steps, nor how weights are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels import _cpu
from shoal.kernels.api import Heads, LayerParts


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in panels, with the tensors whose addresses the extension holds."""

    narrow: _cpu.Linear  # gives the dtype of its input
    wide: _cpu.Linear  # gives float32; of a gated layer the sums, panels of gate and rest in turn
    gated: bool
    dtype: torch.dtype  # of its input
    inputs: int
    outputs: int
    owned: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class PreparedHeads:
    """A layer's heads, with the tensors whose addresses the extension holds."""

    heads: _cpu.Heads
    about: Heads
    owned: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A whole layer, with the parts whose addresses the extension holds."""

    layer: _cpu.Layer
    about: PreparedHeads
    width: int
    owned: tuple[object, ...]


def prepare_layer(table: _cpu.Table, parts: LayerParts) -> PreparedLayer:
    """A whole layer of packed and prepared parts, whose shapes fit each other."""
    packed = (parts.qkv, parts.out, parts.gate_up, parts.down)
    qkv, out, gate_up, down = (each for each in packed if isinstance(each, PackedLinear))
    assert isinstance(parts.heads, PreparedHeads) and parts.scale > 0, parts
    heads = parts.heads.about
    assert qkv.outputs == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, parts
    assert out.inputs == heads.num_heads * heads.head_dim and down.inputs == gate_up.outputs, parts
    assert qkv.inputs == gate_up.inputs == out.outputs == down.outputs and gate_up.gated, parts
    norms = [None if each is None else each.contiguous() for each in parts.norms]
    assert all(each is None or (each.shape == (qkv.inputs,) and each.dtype == torch.float32) for each in norms)
    layer = _cpu.Layer(
        table, [0 if each is None else each.data_ptr() for each in norms], parts.eps, qkv.narrow, out.narrow,
        gate_up.narrow, down.narrow, parts.heads.heads, parts.scale, parts.window, parts.softcap, parts.factor,
    )  # fmt: skip
    return PreparedLayer(layer, parts.heads, qkv.inputs, (*packed, *norms))
