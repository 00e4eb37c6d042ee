"""This machine's cost model for a model: measured in seconds by a process of its own, and kept for later.

It knows where measurements are kept and what they depend on; it must not know how they are made, nor load torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from shoal.core.errors import ShoalError
from shoal.jobs.devices import kind_of, parse_devices
from shoal.jobs.prepare import arithmetic, instruction_set
from shoal.preview.sizes import Sizes
from shoal.sched.cost import MeasuredCost

ERROR, MOST_ERROR = 0.15, 0.5  # shares that a prediction may be off: on a steady machine, and on any
TIMEOUT = 120  # seconds: a measurement takes a few
ONLY_PROCESSOR = "only the processor is measured, and the model runs elsewhere"
SEVERAL = "the time of several engines beside each other is not predicted"
PROCESSOR = ("model name", "cpu family", "model", "stepping", "cache size", "CPU part", "CPU implementer")


class Measured(msgspec.Struct, frozen=True):
    """What was measured, and when."""

    layers: tuple[tuple[float, float], ...]
    answers: tuple[tuple[float, float], ...]
    pair: float
    read: float
    draw: float  # seconds more for a token that is drawn, instead of being the likeliest
    begin: float  # seconds to let a row in
    score: float  # seconds to find the likelihood of a prompt's token
    block: int
    threads: int
    start: float  # seconds until an engine's process has loaded its libraries
    build: float  # seconds to make and pack the weights that were measured with
    measured_bytes: int  # of these weights
    listed: float = 0.0  # seconds for a block in the list of a sequence
    opened: float = 0.0  # seconds more to let a row in, for each block of its prompt
    unsteady: float = 0.0  # share by which the same work took longer in one round than in another
    at: float = 0.0  # Unix time

    @property
    def error(self) -> float:
        """Share that a prediction may be off where all answers' lengths are known."""
        return min(max(ERROR, self.unsteady), MOST_ERROR)

    def cost(self, drawn: float = 0.0) -> MeasuredCost:
        """As the scheduler's simulator takes it, where this share of the rows draws its tokens."""
        answers = tuple((rows, seconds + drawn * self.draw * rows) for rows, seconds in self.answers)
        rates = self.begin, self.score, self.listed, self.opened, self.block
        return MeasuredCost(self.layers, answers, self.pair, self.read, *rates)

    def load(self, weight_bytes: int) -> float:
        """Seconds until an engine with so many bytes of weights is ready."""
        return self.start + self.build * weight_bytes / max(self.measured_bytes, 1)


class Unmeasured(ShoalError):
    """This machine cannot be measured, and why: everything but times can be said all the same."""


def measured(folder: Path, sizes: Sizes, weights: str, kv: str, threads: int | None, again: bool = False) -> Measured:
    """The measurement for this machine, code, model shape and threads; made now where none is kept, or `again`."""
    path = cache_folder() / f"{key(folder, sizes, weights, kv, threads)}.json"
    if not again and (found := _kept(path)) is not None:
        return found
    found = msgspec.structs.replace(_measure(folder, weights, kv, threads), at=time.time())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.encode(found))
        part.replace(path)
    except OSError as error:
        raise ShoalError(
            f"{path} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    return found


def elsewhere(device: str) -> str:
    """Why the time on a device is not predicted; "" where it is."""
    if kind_of(device) != "cpu":
        return ONLY_PROCESSOR
    return SEVERAL if len(parse_devices(device)) > 1 else ""


def kept(folder: Path, sizes: Sizes, weights: str, kv: str, threads: int | None) -> Measured | None:
    """The measurement as it is kept; None where there is none."""
    return _kept(cache_folder() / f"{key(folder, sizes, weights, kv, threads)}.json")


def cache_folder() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shoal" / "measured"


def key(folder: Path, sizes: Sizes, weights: str, kv: str, threads: int | None) -> str:
    """Another one whenever a measurement could come out otherwise: processor, threads, code, libraries, shape."""
    facts = {
        "processor": _processor(),
        "instruction_set": os.environ.get("SHOAL_ISA") or instruction_set(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": _threads(threads),
        "arithmetic": arithmetic(),
        "measure": _code(),
        "torch": _version("torch"),
        "sizes": asdict(sizes),
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "modes": [weights, kv],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _kept(path: Path) -> Measured | None:
    """What is kept at a path; None where nothing is, or what cannot be read: it is measured again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError):
        return None


def _measure(folder: Path, weights: str, kv: str, threads: int | None) -> Measured:
    environment = {"GOMP_SPINCOUNT": "5000", **os.environ}  # as an engine's process has it
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "shoal.bench.calibrate", str(folder), weights, kv, str(time.monotonic())]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unmeasured(f"measuring this machine failed: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Unmeasured(f"measuring this machine failed (exit code {done.returncode}): {last}")
    return msgspec.json.decode(done.stdout, type=Measured)


def _threads(threads: int | None) -> str:
    return str(threads or os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _processor() -> list[str]:
    """Lines of /proc/cpuinfo that say which processor this is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.split(":")[0].strip() in PROCESSOR})


def _code() -> str:
    """One hash over the code that measures and that is measured beside the arithmetic."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    paths = [package / "bench" / name for name in ("calibrate.py", "steps.py")]
    paths += [
        package / "client.py",
        package / "engine.py",
        *sorted(path for name in ("kv", "sched") for path in (package / name).rglob("*.py")),
    ]
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
