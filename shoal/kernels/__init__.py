"""Functions on tensors: a protocol (api) and its implementations. They know shapes, never models, requests or files."""

from shoal.kernels.api import KV, Batch, Kernels, load

__all__ = ["KV", "Batch", "Kernels", "load"]
