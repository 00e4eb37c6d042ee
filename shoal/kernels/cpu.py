"""The compiled kernels behind tensors: checks shapes, then passes addresses to the extension.

It must not know the arithmetic (csrc does), nor any other part of the package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.kernels import _cpu


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets this machine can run, best first; the last is always "scalar"."""
    return tuple(_cpu.names())


def choose(environment: Mapping[str, str]) -> str:
    """The instruction set to use: SHOAL_ISA when it is set (a ValueError when the machine lacks it), else the best."""
    here = instruction_sets()
    wanted = environment.get("SHOAL_ISA", "")
    if wanted and wanted not in here:
        raise ValueError(
            f"SHOAL_ISA={wanted}, but this machine runs only {', '.join(here)}: unset it or name one of these"
        )
    return wanted or here[0]


class CpuKernels:
    """Kernels of one instruction set. Tensors are contiguous, on the CPU, fp32 or bf16 throughout a call."""

    def __init__(self, name: str) -> None:
        self._table = _cpu.Table(name)

    @property
    def name(self) -> str:
        return self._table.name

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Each row over its root mean square, times the weight: [T, D], computed in fp32 and rounded once.

        A row's result does not depend on the other rows. T may be 0.
        """
        rows, columns = x_TD.shape
        assert weight_D.shape == (columns,), (x_TD.shape, weight_D.shape)
        assert x_TD.dtype == weight_D.dtype, (x_TD.dtype, weight_D.dtype)
        assert x_TD.is_contiguous() and weight_D.is_contiguous(), "tensors must be contiguous"
        run = {torch.float32: self._table.rms_norm_fp32, torch.bfloat16: self._table.rms_norm_bf16}[x_TD.dtype]
        out_TD = torch.empty_like(x_TD)
        run(x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), rows, columns, eps)
        return out_TD
