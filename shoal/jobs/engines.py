"""One engine after the other: starts it, and another when it has died, with a longer pause each time.

It knows processes and what they say of themselves; it must not know rows, nor what was lost with an engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from shoal.client import Backend, Begin, EngineProcess, News
from shoal.core.config import EngineConfig
from shoal.core.errors import EngineDied, ShoalError
from shoal.core.types import Request
from shoal.jobs.devices import Device
from shoal.jobs.display import Display
from shoal.jobs.meter import Meter
from shoal.jobs.options import JobOptions
from shoal.jobs.patience import Patience
from shoal.jobs.prepare import Prepared, ServedWords
from shoal.jobs.stop import Stop, WallClock
from shoal.jobs.units import duration
from shoal.remote.own import Command, OwnServer
from shoal.remote.vllm import Wishes, command

POLL = 0.1  # seconds to wait for news before looking after the files and the display
LOADS = 3  # engines that may die while they load the model, one after the other
DEATHS = 8  # engine deaths in a row without any row completed, after which the job gives up
LONGEST = 30.0  # seconds between a death and the next start, at most
SERVER_LOG = "vllm.log"  # in the state folder
STILL = 30.0  # seconds between words about a server that is not ready yet


def pause_after(deaths: int) -> float:
    """Seconds to wait after so many deaths in a row: none after the first, for most have nothing to do with what the
    machine is short of; then longer and longer, so that whatever took the memory may go."""
    return min(2.0 ** (deaths - 2), LONGEST) if deaths > 1 else 0.0


def start_process(device: Device, threads: int | None) -> EngineProcess:
    """A process for an engine on a device, told nothing so far."""
    return EngineProcess(threads or 0, device.cores)


def gives_up(death: EngineDied, deaths: int) -> None:
    """Raise after so many deaths in a row that there is no sense in another engine."""
    if deaths >= DEATHS:
        raise ShoalError(
            f"{death}, {deaths} times without completing a row; what was answered is kept: see what it "
            "printed, give it more memory or a smaller --memory, and run the same command again"
        )


def open_servers(options: JobOptions) -> Backend | None:
    """The servers that answer in place of an engine; None where one of ours does."""
    if not options.endpoints:
        return None
    from shoal.remote.backend import Servers  # here, so that other jobs need not load what speaks HTTP

    return Servers(options.endpoints, os.environ.get("OPENAI_API_KEY", ""))


def start_vllm(job: Prepared) -> OwnServer:
    """vLLM's server for a job, which loads its model from now on."""
    options, vllm = job.options, job.vllm
    assert vllm is not None and isinstance(job.words, ServedWords) and job.words.folder is not None
    wishes = Wishes(
        job.words.folder, job.name, job.manifest.weight_mode, options.memory, options.step_tokens,
        options.threads, options.engine().device,
    )  # fmt: skip

    def make(port: int, key: str) -> Command:
        return command(vllm, wishes, port, key, os.environ)

    return OwnServer(vllm.name, make, job.state.path / SERVER_LOG, job.name)


class Engines:
    """The engine that a job has now. Changed by the job's loop alone."""

    number = 1

    def __init__(
        self, process: EngineProcess | None, backend: Backend | None, make: Callable[[], EngineProcess],
        meter: Meter, patience: Patience, display: Display, stop: Stop,
    ) -> None:  # fmt: skip
        """`process` has been started and told nothing; `make` starts another; `backend` is used instead of both."""
        self.process, self.backend = process, backend
        self.deaths = 0  # since a row was last completed
        self._make, self._meter, self._patience, self._display, self._stop = make, meter, patience, display, stop
        self._clock = WallClock()
        self._server: OwnServer | None = None

    def reach(self, job: Prepared) -> None:
        """Have servers to ask. Where one is to be started for the job, wait until it answers, unless asked to stop."""
        if self.backend is not None:
            return
        server = self._server = start_vllm(job)
        began = told = self._clock.now()
        self._display.note(f"engine  {server.name} loads {job.name}; what it says is in {server.log}")
        while not self._stop.asked:
            if server.ready(POLL):
                self.backend = server
                self._meter.reached(server.seconds)
                self._display.note(f"engine  {server.name} answers after {duration(server.seconds)}")
                return
            now = self._clock.now()
            if now - told > STILL:
                told = now
                self._display.note(f"engine  {server.name} has been loading for {duration(now - began)}")

    def start(
        self, config: EngineConfig, useful: int, loading: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Have an engine with memory for up to `useful` tokens, unless asked to stop meanwhile.

        `loading` is done once, while the first engine loads.
        """
        if self.backend is not None:
            return loading()
        for loads in range(1, LOADS + 1):
            try:
                return self._load(config, useful, loading if loads == 1 else lambda: None)
            except EngineDied as error:
                death = error
                if self._stop.asked:
                    return
            self.process = None
            self._display.warn(f"{death} while it loaded the model; starting another")
            if loads < LOADS:
                self.wait(pause_after(loads), meanwhile)
        raise ShoalError(
            f"{death} while it loaded the model, {LOADS} times: see what it printed and whether memory is short, "
            "and run the same command again to continue"
        ) from death

    def _load(self, config: EngineConfig, useful: int, loading: Callable[[], None]) -> None:
        if self.process is None:
            self.process = self._make()
        self.process.begin(Begin(config, useful))
        loading()
        while not self._stop.asked:
            ready = self.process.ready(POLL)
            if ready is not None:
                self._meter.loaded(ready, self.process.pid)
                self._patience.begin(self._clock.now())
                self.backend = self.process
                return

    def bury(self, death: EngineDied) -> bool:
        """Take note of a death. Raises when there is no sense in another engine; False when there is no time for it."""
        if self.process is None:
            raise death
        if self._stop.asked:  # by a signal that has reached both
            self.backend = None
            return False
        self.deaths += 1
        self._meter.died()
        gives_up(death, self.deaths)
        self._display.warn(f"{death}; starting another, its unfinished rows run again")
        self.process, self.backend = None, None
        return True

    def wait(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Let time pass, doing `meanwhile` now and then, unless asked to stop."""
        if seconds:
            self._display.warn(f"waiting {seconds:g} s before the next engine")
        end = self._clock.now() + seconds
        while not self._stop.asked and (left := end - self._clock.now()) > 0:
            meanwhile()
            time.sleep(min(left, POLL))

    def revive(self, engine: int, config: EngineConfig, useful: int, meanwhile: Callable[[], None]) -> None:
        """Have another engine in place of the dead one, after a pause."""
        self.wait(pause_after(self.deaths), meanwhile)
        self.start(config, useful, meanwhile=meanwhile)

    def answered(self, engine: int) -> None:
        """A row was completed."""
        self.deaths = 0

    # -- the backend -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests may be handed in."""
        return self.backend is not None

    def submit(self, engine: int, requests: Iterable[Request], watched: frozenset[str]) -> None:
        """Hand in requests."""
        assert self.backend is not None
        self.backend.submit(requests, watched)

    def cancel(self, ids: Iterable[str]) -> None:
        """End requests."""
        if self.backend is not None:
            self.backend.cancel(ids)

    def outputs(self, timeout: float) -> News | None:
        """The next news."""
        assert self.backend is not None
        news = self.backend.outputs(timeout)
        if news is not None:
            self._patience.heard(self._clock.now())
        return news

    def idle(self) -> None:
        """Until now it had nothing to say."""
        self._patience.begin(self._clock.now())

    def silent(self) -> str:
        """What to say of the silence of an engine that has no news; "" nearly always."""
        return "" if self.process is None else self._patience.words(self._clock.now(), self.process.pid)

    def close(self) -> None:
        """End it."""
        for one in (self.process, self._server):
            if one is not None:
                one.close()
