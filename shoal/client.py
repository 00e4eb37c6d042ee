"""An engine as its users see it: hand in requests, take out news. In this process, or in one of its own.

It knows the words that go back and forth; it must not know tensors, files, or what a request is for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Protocol

from shoal.core.config import EngineConfig
from shoal.core.errors import EngineDied, ShoalError
from shoal.core.types import Output, Request
from shoal.engine import Engine

NEWS_EVERY = 0.2  # seconds after which an engine reports how it is doing, news or not
GOODBYE = 5.0  # seconds an engine has to end by itself when told to


@dataclass(frozen=True, slots=True)
class Begin:
    """To the engine: what to build. `useful_tokens` bounds its KV memory by what the work at hand can fill; so many
    engines, it among them, `share` the memory that it finds free; one in place of another that had `kv_bytes` for keys
    and values gets at most as many again, for what it finds free is its alone."""

    config: EngineConfig
    useful_tokens: int | None
    share: int = 1
    kv_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine: it is built, and what was found out. Sizes in bytes, times in seconds."""

    device: str
    weights: str
    kernels: str
    threads: int
    num_blocks: int
    block_size: int  # tokens
    kv_bytes: int
    context: int  # tokens
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """From the engine: it cannot be built, and why."""

    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Submit:
    """To the engine: requests, and the ids whose tokens are wanted as they come instead of at the end."""

    requests: tuple[Request, ...]
    watched: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the engine: ids that are to end now. Unknown ids have ended already."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for the log that simulations are fitted to."""

    index: int
    tokens: int
    sequences: int
    prompt_tokens: int  # so far, all steps
    used_blocks: int
    ended: float  # seconds on the engine's clock


@dataclass(frozen=True, slots=True)
class News:
    """From the engine: what has happened since the last News."""

    outputs: tuple[Output, ...] = ()
    started: tuple[str, ...] = ()  # ids that have begun to run; those not started wait
    steps: tuple[StepRecord, ...] = ()
    waiting: int = 0  # requests
    running: int = 0
    used_blocks: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)  # the scheduler's, since the engine was built
    again: tuple[str, ...] = ()  # ids that ran and wait again; those that started after it are in `started`
    warnings: tuple[str, ...] = ()  # what the user is to know
    blamed: tuple[str, ...] = ()  # ids that have failed while others were answered; they go on
    engine: int = 0  # which of several has said it


class Backend(Protocol):
    """The seam below jobs: anything that answers requests."""

    def submit(self, requests: Iterable[Request], watched: frozenset[str]) -> None:
        """Hand in requests; those in `watched` report their tokens as they come."""
        ...

    def cancel(self, ids: Iterable[str]) -> None:
        """End these requests; each ends with one Output, as CANCEL unless it was over already."""
        ...

    def outputs(self, timeout: float) -> News | None:
        """The next news, or None after `timeout` seconds without any. EngineDied when there will be none."""
        ...

    def close(self) -> None:
        """End it. May be called twice."""
        ...


class InProcess:
    """An engine in this process: every call of `outputs` runs one step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._outputs: list[Output] = []
        self._held: dict[str, Output] = {}  # outputs so far of requests that nobody watches
        self._watched: set[str] = set()

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        """Queue requests in the engine."""
        self._watched |= watched
        for request in requests:
            refused = self.engine.add(request)
            if refused is not None:
                self._outputs.append(refused)

    def cancel(self, ids: Iterable[str]) -> None:
        """End requests in the engine."""
        for id in ids:
            output = self.engine.cancel(id)
            if output is not None:
                self._keep(output)

    def outputs(self, timeout: float = 0.0) -> News | None:
        """Run one step and tell what came of it; None when there was nothing to do."""
        if not self.engine.busy and not self._outputs:
            return None
        before = self.engine.scheduler.counters.steps
        for output in self.engine.step():
            self._keep(output)
        scheduler, step = self.engine.scheduler, self.engine.last
        counters = scheduler.counters
        started, steps = (), ()  # type: tuple[str, ...], tuple[StepRecord, ...]
        if step is not None and counters.steps > before:
            started = tuple(start.request.id for start in step.starts)
            now, used = self.engine.clock.now(), scheduler.kv.in_use
            steps = (StepRecord(step.index, step.num_tokens, len(step.slices), counters.prompt_computed, used, now),)
        outputs, self._outputs = tuple(self._outputs), []
        numbers = {name: getattr(counters, name) for name in counters.__slots__}
        waiting, running = len(scheduler.waiting), len(scheduler.running)
        return News(outputs, started, steps, waiting, running, scheduler.kv.in_use, numbers)

    def _keep(self, output: Output) -> None:
        """Give out what is watched or over; hold the rest, so that a request is one message."""
        held = self._held.pop(output.id, None)
        if held is not None:
            # Extended in place: an answer of n tokens comes in n parts.
            held.tokens += output.tokens
            held.logprobs += output.logprobs
            held.scores += output.scores
            output.tokens, output.logprobs, output.scores = held.tokens, held.logprobs, held.scores
        if output.finish is not None or output.id in self._watched:
            self._outputs.append(output)
        else:
            self._held[output.id] = output
        if output.finish is not None:
            self._watched.discard(output.id)

    def close(self) -> None:
        """Nothing to end: the engine belongs to the caller."""


class EngineProcess:
    """An engine in a process of its own, which ends when this process does, however it ends.

    The process starts at once, and loads libraries; `begin` tells it what to build, `ready` waits until it has.
    """

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        """The process keeps to these `cores`; without any, to those of this process."""
        self._connection, theirs = Pipe()
        # A spinning OpenMP thread that shares its core with anybody costs seconds; it must be said before start.
        environment = {"GOMP_SPINCOUNT": "5000", **os.environ}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "shoal.host", str(theirs.fileno()), *map(str, cores)]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self.pid = self._process.pid

    def begin(self, begin: Begin) -> None:
        """Tell the process what to build."""
        self._send(begin)

    def ready(self, timeout: float) -> Ready | None:
        """What was built, or None after `timeout` seconds. ShoalError says why nothing can be; EngineDied that the
        process ended."""
        if not self._poll(timeout):
            return None
        answer = self._receive()
        if isinstance(answer, Failed):
            self.close()
            error = ShoalError(answer.message)
            error.exit_code = answer.exit_code
            raise error
        assert isinstance(answer, Ready), answer
        return answer

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        """Hand in requests."""
        self._send(Submit(tuple(requests), watched))

    def cancel(self, ids: Iterable[str]) -> None:
        """End requests."""
        self._send(Cancel(tuple(ids)))

    def outputs(self, timeout: float) -> News | None:
        """The next news within `timeout` seconds."""
        if not self._poll(timeout):
            return None
        news = self._receive()
        assert isinstance(news, News), news
        return news

    def fileno(self) -> int:
        """What to wait for where there are several: it can be read when the process has said something, or ended."""
        return self._connection.fileno()

    def close(self) -> None:
        """Let the process end by itself, and end it if it does not."""
        self._connection.close()
        try:
            self._process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _poll(self, timeout: float) -> bool:
        try:
            return self._connection.poll(timeout)
        except (BrokenPipeError, EOFError, OSError) as error:
            raise self._died() from error

    def _send(self, message: Begin | Submit | Cancel) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, OSError) as error:
            raise self._died() from error

    def _receive(self) -> object:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> EngineDied:
        self.close()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineDied(f"the engine process ended by itself ({how})")


def connection_of(descriptor: int) -> Connection:
    """The engine's end of the pipe whose descriptor it was given."""
    return Connection(descriptor)
