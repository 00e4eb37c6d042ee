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
    from shoal.kernels.cpu_layers import PackedLinear

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


class Grouped:
    """Rows of a step that have an adapter, those of one adapter side by side, and memory for a gated layer's sums."""

    def __init__(self, adapter_T: Tensor) -> None:
        """Rows of -1 have none."""
        order = torch.argsort(adapter_T, stable=True)
        row_M = order[int((adapter_T < 0).sum()) :]
        adapter_G, counts = adapter_T[row_M].unique_consecutive(return_counts=True)
        start_G1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.num_rows = len(adapter_T)  # of the step
        self._owned = row_M, start_G1, adapter_G
        self.rows = _cpu.Adapted(row_M.data_ptr(), start_G1.data_ptr(), adapter_G.data_ptr(), len(adapter_G))
        self._memory = torch.empty(0)

    def memory(self, numbers: int) -> Tensor:
        """Room for so many numbers, the same in every layer."""
        if len(self._memory) < numbers:
            self._memory = torch.empty(numbers)
        return self._memory
