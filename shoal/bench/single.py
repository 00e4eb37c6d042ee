"""Single kernels and single steps, against the machine's limits.

It knows shapes, operations and bytes of the kernels' functions; it must not know engines or workloads.
"""

from __future__ import annotations

from typing import Any

from shoal.bench.limits import Limits
from shoal.bench.options import BenchOptions


def run(limits: Limits, options: BenchOptions) -> list[dict[str, Any]]:
    return []
