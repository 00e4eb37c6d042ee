"""Several engines in one process, for jobs that run on several devices: what their tests share.

It must not know what a test wants to see; subclasses say which engine is slow, and which dies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

from echo_job import EchoJob, Mortal, echo_backend

from shoal.core.types import Request
from shoal.jobs import fleet


class Several(Mortal):
    """One of several engines, which live on unless a subclass says otherwise. `place` is its device's number."""

    made = 0
    places: list[Sequence[int]] = []

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        super().__init__(threads, cores)
        self.place = cores[0] if cores else 0
        type(self).places.append(cores)
        self._backend = echo_backend(tokens=64, sequences=8)


class Log:
    """Every request that any engine got, by engine and in order."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Request]] = []

    def submit(self, backend: fleet.Fleet, engine: int, requests: Iterable[Request], watched: frozenset[str]) -> None:
        taken = list(requests)
        self.requests += [(engine, request) for request in taken]
        SUBMIT(backend, engine, taken, watched)


SUBMIT = fleet.Fleet.submit


def on_devices(process: type[Several], log: Log | None = None) -> AbstractContextManager[Any]:
    """Engines in this process, each of which takes a step whenever it is asked; eight cores."""
    process.made, process.places = 0, []
    stack = ExitStack()
    log = log or Log()
    stack.enter_context(mock.patch("shoal.jobs.engines.EngineProcess", process))
    stack.enter_context(mock.patch("shoal.jobs.fleet.await_any", lambda members, seconds: members))
    stack.enter_context(mock.patch("shoal.jobs.fleet.pause_after", lambda deaths: 0.0))
    stack.enter_context(mock.patch("shoal.jobs.devices.allowed_cores", lambda: list(range(8))))
    stack.enter_context(mock.patch("shoal.jobs.devices.memory_nodes", list))
    stack.enter_context(mock.patch("shoal.jobs.supply.LEAST", 4))

    def submit(backend: fleet.Fleet, engine: int, requests: Iterable[Request], watched: frozenset[str]) -> None:
        log.submit(backend, engine, requests, watched)

    stack.enter_context(mock.patch.object(fleet.Fleet, "submit", submit))
    return stack


def run_on(one: EchoJob, process: type[Several], devices: str, log: Log | None = None, **more: Any) -> int:
    with on_devices(process, log):
        return one._run(None, {"device": devices, **more})
