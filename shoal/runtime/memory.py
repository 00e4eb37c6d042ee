"""How much memory keys and values may take. It knows limits of the machine; it must not know sequences or policies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from shoal.core.errors import UsageError

if TYPE_CHECKING:
    import torch

RESERVE_BYTES = 10**9  # for activations, logits, the interpreter and everybody else
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 for no limit


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The numbers behind the size of the KV memory, all in bytes but num_blocks."""

    available: int  # before the weights were loaded
    weights: int
    reserve: int
    block: int  # keys and values of one block in all layers
    num_blocks: int
    reason: str  # what decided: "memory", "plan" or "--memory"

    @property
    def total(self) -> int:
        """Bytes of keys and values."""
        return self.num_blocks * self.block

    def __str__(self) -> str:
        limit = {"memory": "all that is free", "plan": "all that the work can use"}.get(self.reason, self.reason)
        return (
            f"KV memory {_gb(self.total)} = {self.num_blocks} blocks ({limit}); "
            f"available {_gb(self.available)}, weights {_gb(self.weights)}, reserve {_gb(self.reserve)}"
        )


def plan_memory(
    available: int, weights: int, block: int, asked: int | None, useful_blocks: int, least_blocks: int = 1
) -> MemoryPlan:
    """How many blocks of `block` bytes: what is free, at most what can be used, or what was asked for (bytes).

    UsageError with what is needed, what is available and the flag when `least_blocks` or the asked bytes do not fit.
    """
    least = least_blocks * block
    if asked is not None:
        if asked < least:
            raise UsageError(f"--memory {_gb(asked)} is too small: needs {_gb(least)} for one row; raise --memory")
        if weights + asked > available:
            raise UsageError(
                f"--memory {_gb(asked)} with weights of {_gb(weights)} needs {_gb(weights + asked)}; "
                f"{_gb(available)} are available: lower --memory"
            )
        return MemoryPlan(available, weights, 0, block, asked // block, "--memory")
    free = available - weights - RESERVE_BYTES
    if free < least:
        raise UsageError(
            f"the model needs {_gb(weights + RESERVE_BYTES + least)} (weights {_gb(weights)}, reserve "
            f"{_gb(RESERVE_BYTES)}, KV memory of one row {_gb(least)}); {_gb(available)} are available: take a smaller "
            f"model, free memory, or give up the reserve with --memory {least}"
        )
    blocks = min(free // block, max(useful_blocks, least_blocks))
    return MemoryPlan(available, weights, RESERVE_BYTES, block, blocks, "memory" if blocks == free // block else "plan")


def plan_weights(available: int, weights: int, seats: int) -> MemoryPlan:
    """The plan of a model without keys and values. UsageError when its weights and the reserve do not fit."""
    if weights + RESERVE_BYTES > available:
        raise UsageError(
            f"the model needs {_gb(weights + RESERVE_BYTES)} (weights {_gb(weights)}, reserve {_gb(RESERVE_BYTES)}); "
            f"{_gb(available)} are available: take a smaller model or free memory"
        )
    return MemoryPlan(available, weights, RESERVE_BYTES, 0, seats, "plan")


def available_bytes(device: torch.device) -> int:
    """Memory that this process may still take on the device."""
    if device.type == "cuda":
        import torch  # here, as who asks for a plan alone needs no tensors

        return int(torch.cuda.mem_get_info(device)[0])
    return available_host_bytes()


def available_host_bytes() -> int:
    """Memory that this process may still take beside the processor."""
    return min([int(psutil.virtual_memory().available), *_control_groups()])


def _control_groups(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Room left under each memory limit of the control groups this process is in; none where there are no limits."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        old = "memory" in controllers.split(",")
        if not old and controllers:
            continue
        base = root / "memory" if old else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each == base.parent:
                break
            room = _room(each, *names)
            if room is not None:
                yield room


def _room(folder: Path, limit_name: str, usage_name: str) -> int | None:
    """Limit less usage, file pages that the kernel would give back not counted; None without a limit."""
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        usage = int((folder / usage_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # not a group with a limit that we may read
    idle = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return max(0, int(limit) - usage + int(idle))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count / 1e6:.2f} MB"
