"""What a measurement was made on, and what the rest of the machine did meanwhile.

It knows /proc and the packages' versions; it must not know what is measured. Elsewhere than on Linux, what only /proc
tells is None.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from shoal import __version__

_PACKAGES = ("torch", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time: seconds of wall, CPU seconds of this process (all threads), cores that others kept busy."""

    wall: float
    cpu: float
    others: float | None
    load: float  # one-minute load average at its end


class Stopwatch:
    """Measures from its making to `stop`."""

    def __init__(self) -> None:
        self._busy, self._cpu, self._wall = _busy(), _own(), time.perf_counter()

    def stop(self) -> Span:
        """The time since it was made."""
        wall, cpu, busy = time.perf_counter() - self._wall, _own() - self._cpu, _busy()
        others = None if busy is None or self._busy is None else max(0.0, (busy - self._busy - cpu) / wall)
        return Span(wall, cpu, others, os.getloadavg()[0])


def _own() -> float:
    times = os.times()
    return times.user + times.system


def _busy() -> float | None:
    """Seconds that all cores together have worked since the machine started."""
    try:
        numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle = numbers[3] + numbers[4]
    return (sum(numbers) - idle) / os.sysconf("SC_CLK_TCK")


def wait_quiet(cores: float = 0.2) -> None:
    """Return when others have kept fewer cores busy for two seconds, or at last after QUIET_WAIT seconds (120)."""
    quiet, end = 0, time.perf_counter() + float(os.environ.get("QUIET_WAIT", "120"))
    while quiet < 2 and time.perf_counter() < end:
        stopwatch = Stopwatch()
        time.sleep(1.0)
        others = stopwatch.stop().others
        quiet = quiet + 1 if others is None or others < cores else 0


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then counts from the start of the process: more, not less


def peak_memory() -> int | None:
    """Most bytes resident at a time."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def describe() -> dict[str, object]:
    """The machine and the versions, for the record."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "shoal": __version__, **_versions()},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_", "KMP_"))
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
