"""The devices that a job is to run on, as a user names them, and the parts of this machine that they stand for.

It knows names, processor cores and memory nodes; it must not know engines, models or what a device computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from shoal.core.errors import UsageError

NODES = Path("/sys/devices/system/node")
CORES = Path("/sys/devices/system/cpu")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Device:
    """Where one engine runs."""

    name: str  # as an engine is told: cpu, cuda or cuda:N
    cores: tuple[int, ...] = ()  # the engine keeps to these; none: to whatever it is given
    share: int = 1  # engines that take their keys and values from the same memory


def parse_devices(text: str) -> tuple[str, ...]:
    """The names in `text`, which is cpu, cuda, or a list such as 0,1 or cuda:0,cuda:1; a UsageError for others."""
    names = tuple(name.strip() for name in text.split(","))
    if len(names) == 1 and names[0] in ("cpu", "cuda"):
        return names
    for name in names:
        if not re.fullmatch(r"((cpu|cuda):)?\d+", name):
            raise UsageError(
                f"device is {text!r}; it must be cpu, cuda or cuda:N, or a list: 0,1 or cuda:0,cuda:1 or cpu:0,cpu:1"
            )
    if len({name.rpartition(":")[0] for name in names}) > 1:
        raise UsageError(f"device is {text!r}; the answers of one job come from devices of one kind: name only those")
    if len({int(name.rpartition(":")[2]) for name in names}) < len(names):
        raise UsageError(f"device is {text!r}, and one is named twice: an engine needs a device of its own")
    return names


def kind_of(text: str) -> str:
    """cpu or cuda: by which of them the devices compute. Bare numbers are cards where there are some."""
    first = parse_devices(text)[0]
    if first.isdecimal():
        return "cuda" if cards_there() else "cpu"
    return first.partition(":")[0]


def first_of(text: str) -> str:
    """The first of the devices as an engine is told, without a look at this machine's cores."""
    name = parse_devices(text)[0]
    return f"cuda:{name.rpartition(':')[2]}" if name != "cuda" and kind_of(text) == "cuda" else kind_of(text)


def cards_there() -> bool:
    """Whether bare numbers mean cards: there is a driver, and the installed torch can use it. Loads no torch."""
    return DRIVER.exists() and not version("torch").endswith("+cpu")


def devices_of(text: str) -> list[Device]:
    """What each engine of a job is given. UsageErrors for what this machine does not have."""
    names, kind = parse_devices(text), kind_of(text)
    if names[0] in ("cpu", "cuda"):
        return [Device(names[0])]
    numbers = [int(name.rpartition(":")[2]) for name in names]
    if kind == "cuda":
        return [Device(f"cuda:{number}") for number in numbers]
    return [Device("cpu", part, len(names)) for part in split_cores(numbers, allowed_cores(), memory_nodes())]


def split_cores(
    numbers: Sequence[int], allowed: Sequence[int], nodes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The cores of each part: memory nodes where the numbers name such, else the allowed cores in equal runs, so that
    no core is in two parts."""
    own = [tuple(core for core in node if core in set(allowed)) for node in nodes]
    if sum(map(bool, own)) > 1 and all(number < len(own) and own[number] for number in numbers):
        return [own[number] for number in numbers]
    if len(numbers) > len(allowed):
        raise UsageError(f"there are {len(allowed)} cores for {len(numbers)} engines: name fewer devices")
    bounds = [len(allowed) * place // len(numbers) for place in range(len(numbers) + 1)]
    return [tuple(allowed[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def allowed_cores(root: Path = CORES) -> list[int]:
    """Cores that this process may use, neighbours first: those of one socket together, and those of one core."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return sorted(allowed, key=lambda core: (*_place(root / f"cpu{core}" / "topology"), core))


def memory_nodes(root: Path = NODES) -> list[tuple[int, ...]]:
    """The cores of each memory node, by its number; none where the system does not say."""
    found = {}
    for folder in root.glob("node[0-9]*"):
        try:
            found[int(folder.name[4:])] = parse_cores((folder / "cpulist").read_text())
        except (OSError, ValueError):
            return []
    return [found.get(number, ()) for number in range(max(found, default=-1) + 1)]


def parse_cores(text: str) -> tuple[int, ...]:
    """Numbers in a list such as 0-3,8."""
    runs = [run.partition("-") for run in text.strip().split(",") if run]
    return tuple(core for low, _, high in runs for core in range(int(low), int(high or low) + 1))


def _place(folder: Path) -> tuple[int, int]:
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0  # the system does not say: by their numbers
