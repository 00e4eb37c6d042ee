"""Functions on tensors: a protocol (api) and its implementations. They know shapes, never models, requests or files."""

from __future__ import annotations

import os

import torch

from shoal.kernels import _cpu
from shoal.kernels.api import KV, WEIGHT_BITS, Batch, Delta, Draws, Heads, Kernels, Scores, Up
from shoal.kernels.ref import RefKernels

__all__ = ["KV", "WEIGHT_BITS", "Batch", "Delta", "Draws", "Heads", "Kernels", "Scores", "Up", "load"]


def set_threads(threads: int) -> None:
    """Let torch and the compiled kernels use so many CPU threads each; they are never at work at the same time."""
    torch.set_num_threads(threads)
    _cpu.set_threads(threads)


def load(name: str, device: str = "cpu", threads: int | None = None) -> Kernels:
    """Return the backend of that name on a device ("cpu", "cuda", "cuda:1"). ValueError for one that cannot be.

    "auto" is the compiled kernels on a CPU, and plain torch elsewhere. `threads` sets the number of CPU threads of the
    whole process; None leaves it alone.
    """
    if threads is not None:
        set_threads(threads)
    on_cpu = torch.device(device).type == "cpu"
    if name == "ref" or (name == "auto" and not on_cpu):
        return RefKernels(torch.device(device))
    if name in ("cpu", "auto") and on_cpu:
        from shoal.kernels.cpu import CpuKernels, choose  # here, as the extension is not needed on other devices

        return CpuKernels(choose(os.environ))
    raise ValueError(f"no kernels {name!r} on device {device!r}: known are 'cpu' (on cpu) and 'ref'")
