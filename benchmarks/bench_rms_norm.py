"""The compiled kernel of each instruction set against torch and against its floor, the time to move its bytes.

python -m benchmarks.bench_rms_norm
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.common import write_result
from shoal.kernels import set_threads
from shoal.kernels.cpu import CpuKernels, instruction_sets

ROWS, COLUMNS, EPS = 256, 896, 1e-6  # a step of decodes of a half-billion model: stays in the caches
ROUNDS, INNER = 30, 20


Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def norms() -> dict[str, Norm]:
    """Everything that is compared, by name."""

    def compiled(name: str) -> Norm:
        kernels = CpuKernels(name)
        return lambda x, weight: kernels.rms_norm(x, weight, EPS)

    return {
        **{name: compiled(name) for name in instruction_sets()},
        "torch": lambda x, weight: torch.nn.functional.rms_norm(x, (COLUMNS,), weight, EPS),
        "floor: a copy": lambda x, weight: x.clone(),
    }


def seconds(norm: Norm, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Of one call, over a few calls in a row."""
    began = time.perf_counter()
    for _ in range(INNER):
        norm(x, weight)
    return (time.perf_counter() - began) / INNER


def main() -> None:
    """Measure all of them in turn, on one thread."""
    set_threads(1)
    generator = torch.Generator().manual_seed(0)
    result: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
        weight = torch.randn(COLUMNS, generator=generator).to(dtype)
        times: dict[str, list[float]] = {name: [] for name in norms()}
        for _ in range(ROUNDS):
            for name, norm in norms().items():
                times[name].append(seconds(norm, x, weight))
        medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
        floor = medians["floor: a copy"]
        result[str(dtype)] = {name: round(value, 1) for name, value in medians.items()}
        result[f"{dtype} over the floor"] = {name: round(value / floor, 2) for name, value in medians.items()}
    print("microseconds a call\n" + json.dumps(result, indent=1))
    write_result("bench_rms_norm", {"rows": ROWS, "columns": COLUMNS, "threads": 1, "microseconds": result}, seed=0)


if __name__ == "__main__":
    main()
