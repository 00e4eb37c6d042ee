"""What the machine can do at most, measured with the kernels' own instructions in about two seconds.

It knows the extension's measures and the clock; it must not know any model or workload.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from shoal.kernels import _cpu  # type: ignore[attr-defined]  # compiled
from shoal.kernels.cpu import choose

SUSTAINED = 430 / 478
"""Share of the register peak that a matrix product reaches with its operands in caches and nothing left to improve:
430 of 478 GF/s on the processor that the floor was first set on."""

BUFFER = 1 << 30  # bytes read for the bandwidth: far more than caches hold
_BURST = 0.02  # seconds of one try; the best of them counts, as a neighbour can only make a try slower
_KINDS = {"fp32": _cpu.Kind.FP32, "bf16": _cpu.Kind.BF16, "int8": _cpu.Kind.INT8}


@dataclass(frozen=True, slots=True)
class Limits:
    """On all threads together: operations/s of the products of each arithmetic in registers, and bytes/s read."""

    threads: int
    instruction_set: str
    peak: dict[str, float]  # by fp32, bf16, int8; a product and a sum are two operations
    bandwidth: float

    def rate(self, arithmetic: str) -> float:
        """Operations/s that the floor grants to matrix products in this arithmetic."""
        return SUSTAINED * self.peak[arithmetic]


def measure(seconds: float = 2.0) -> Limits:
    """Measure on the threads that torch has now, in about so many seconds beside the filling of the buffer."""
    threads = torch.get_num_threads()
    name = choose(os.environ)
    table = _cpu.Table(name)
    share = seconds / (len(_KINDS) + 1)
    peak = {arithmetic: _peak(table, kind, share) for arithmetic, kind in _KINDS.items()}
    memory = torch.ones(BUFFER, dtype=torch.uint8)
    bandwidth = _best(lambda: table.read(memory.data_ptr(), BUFFER), share)
    return Limits(threads, name, peak, bandwidth)


def _peak(table: _cpu.Table, kind: _cpu.Kind, seconds: float) -> float:
    iterations, took = 1000, 0.0
    while took < _BURST / 2:
        began = time.perf_counter()
        table.peak(kind, iterations)
        took = time.perf_counter() - began
        if took < _BURST / 2:
            iterations = int(iterations * min(10.0, 1.2 * _BURST / took))
    return _best(partial(table.peak, kind, iterations), seconds)


def _best(work: Callable[[], float], seconds: float) -> float:
    """The highest amount per second of as many tries as fit, three at least."""
    best, tries, end = 0.0, 0, time.perf_counter() + seconds
    while tries < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - began))
        tries += 1
    return best
