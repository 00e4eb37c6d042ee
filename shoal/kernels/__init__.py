"""Functions on tensors: a protocol (api) and its implementations. They know shapes, never models, requests or files."""

from __future__ import annotations

import torch

from shoal.kernels.api import KV, Batch, Kernels
from shoal.kernels.ref import RefKernels

__all__ = ["KV", "Batch", "Kernels", "load"]


def load(name: str, device: str = "cpu", threads: int | None = None) -> Kernels:
    """Return the backend of that name on a device ("cpu", "cuda", "cuda:1"). ValueError for a name nobody knows.

    `threads` sets the number of CPU threads of the whole process; None leaves it alone.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "ref":
        return RefKernels(torch.device(device))
    raise ValueError(f"unknown kernels {name!r}: known are 'ref'")
