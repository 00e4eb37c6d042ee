"""What each of several engines does: rows, tokens, time with work; and what is computed more than once because they are
several.

It knows counts, and the names under which they are noted in the journal; it must not know engines nor the plan.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from shoal.jobs.report import Engine

APART = "apart"  # names in what a job has spent
PREFIX = "engine"
COUNTED = {"prompt_computed": "prompt", "output_computed": "output"}


class Shares:
    """Of one run. Changed by the job's meter, and by what runs the engines."""

    def __init__(self) -> None:
        self.apart = 0  # prompt tokens computed on more than one engine
        self._devices: dict[int, str] = {}
        self._rows = Counter[int]()
        self._dead = Counter[tuple[int, str]]()  # counters of engines that have died
        self._living: dict[int, Mapping[str, int]] = {}
        self._busy = Counter[int]()  # nanoseconds
        self._since: dict[int, int] = {}  # when the engines that have work got it
        self._last: dict[str, float] | None = None  # what is noted from here on

    def device(self, engine: int, device: str) -> None:
        """Where an engine runs."""
        self._devices[engine] = device

    def heard(self, engine: int, counters: Mapping[str, int]) -> None:
        """An engine's own counters."""
        self._living[engine] = counters

    def completed(self, engine: int) -> None:
        """It has completed a row."""
        self._rows[engine] += 1

    def works(self, engine: int, busy: bool) -> None:
        """It has something to do from now on, or nothing."""
        now = time.monotonic_ns()
        if busy:
            self._since.setdefault(engine, now)
        elif engine in self._since:
            self._busy[engine] += now - self._since.pop(engine)

    def died(self, engine: int) -> None:
        """Its counters are gone."""
        for name in COUNTED:
            self._dead[engine, name] += self._living.get(engine, {}).get(name, 0)
        self._living.pop(engine, None)

    def freeze(self) -> None:
        """What follows is no part of the job."""
        self._last = self.spent()

    def spent(self) -> dict[str, float]:
        """All that is to be noted; nothing of one engine alone."""
        if self._last is not None:
            return self._last
        if len(self._devices) < 2:
            return {}
        now, found = time.monotonic_ns(), {APART: float(self.apart)}
        for engine, device in self._devices.items():
            busy = self._busy[engine] + now - self._since.get(engine, now)
            numbers = {"rows": float(self._rows[engine]), "seconds": busy / 1e9}
            for name, short in COUNTED.items():
                numbers[short] = float(self._dead[engine, name] + self._living.get(engine, {}).get(name, 0))
            found |= {f"{PREFIX} {engine} {device} {name}": number for name, number in numbers.items()}
        return found


def engines_of(spent: Mapping[str, float]) -> list[Engine]:
    """The engines of which a job has noted something, in the order of their numbers."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for key, number in spent.items():
        if key.startswith(PREFIX + " "):
            _, engine, device, name = key.split(" ")
            found.setdefault((int(engine), device), {})[name] = number
    return [
        Engine(device, int(of["rows"]), int(of["prompt"]), int(of["output"]), of["seconds"])
        for (_, device), of in sorted(found.items())
    ]
