"""What adapters add to linear layers, as the extension takes it: packed once for a layer, rows grouped once for a step.

It knows panels, and must not know steps, nor how anything is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels import _cpu
from shoal.kernels.api import Delta

if TYPE_CHECKING:
    from shoal.kernels.cpu import PackedLinear

PANEL = 32  # outputs of a weight that lie together


@dataclass(slots=True)
class PackedDeltas:
    """What adapters add to one layer, by number, with the tensors whose addresses the extension holds."""

    deltas: _cpu.Deltas
    inputs: int
    outputs: int  # of the layer
    gated: bool  # then they are added to its sums: panels of gate and rest in turn
    _owned: list[PackedLinear] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Of what they are added to."""
        return 2 * (self.outputs + -self.outputs % PANEL) if self.gated else self.outputs

    def append(self, delta: Delta | None, pack: Callable[[Tensor], PackedLinear]) -> None:
        """Take the next adapter's; None adds nothing."""
        if delta is None:
            self.deltas.append(None, [])
            return
        down, ups = pack(delta.down_HK), []
        assert down.inputs == self.inputs, (down, self)
        self._owned.append(down)
        for up in delta.ups:
            weight = pack(up.weight_NR)
            self._owned.append(weight)
            side, first = divmod(up.first, self.outputs)
            assert first + weight.outputs <= self.outputs and up.begin + weight.inputs <= down.outputs, (up, self)
            assert (not side or self.gated) and (not first or not self.gated), (up, self)
            stride = 2 * PANEL if self.gated else PANEL
            ups.append(_cpu.Up(weight.wide, up.scale, up.begin, first + side * PANEL, stride))
        self.deltas.append(down.narrow, ups)


@dataclass(slots=True)
class Grouped:
    """Rows of a step that have an adapter, those of one adapter side by side, and memory for a gated layer's sums."""

    row_M: Tensor
    start_G1: Tensor
    adapter_G: Tensor
    num_rows: int  # of the step
    sums: Tensor | None = None


def group(adapter_T: Tensor) -> Grouped:
    """Sort rows by the number of their adapter, leaving out those that have none (-1)."""
    order = torch.argsort(adapter_T, stable=True)
    plain = int((adapter_T < 0).sum())
    row_M = order[plain:].clone()
    adapter_G, counts = adapter_T[row_M].unique_consecutive(return_counts=True)
    start_G1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Grouped(row_M, start_G1, adapter_G, len(adapter_T))
