"""The main job in one process over the real scheduler and an engine that hashes: what its tests share.

It must not know what a test wants to see; backends here break in ways that tests choose.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from shoal.client import Backend, Begin, InProcess, News, Ready
from shoal.core.clock import SimClock
from shoal.core.errors import EngineDied
from shoal.core.types import Request
from shoal.engine import Engine
from shoal.jobs.engines import Engines
from shoal.jobs.foretold import Seer
from shoal.jobs.options import JobOptions
from shoal.jobs.report import Report, read_report
from shoal.jobs.run import run_job
from shoal.jobs.state import folder_of
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor

BLOCK = 16


def echo_backend(num_blocks: int = 4096, ahead: int = 1, tokens: int = 256, sequences: int = 64) -> InProcess:
    """An engine of its own with room for `num_blocks` blocks."""
    scheduler = Scheduler(BatchPolicy(Budget(tokens, sequences)), num_blocks, BLOCK)
    clock = SimClock()
    return InProcess(Engine(scheduler, EchoExecutor(num_blocks, BLOCK, clock), clock, ahead))


def chat(number: int, text: str | None = None, **body: Any) -> str:
    """A chat row of the OpenAI Batch shape."""
    messages = [{"role": "user", "content": text if text is not None else f"Question {number}"}]
    return _row(number, "/v1/chat/completions", {"messages": messages, "max_tokens": 5, **body})


def completion(number: int, prompt: Any, **body: Any) -> str:
    """A completion row of the OpenAI Batch shape."""
    return _row(number, "/v1/completions", {"prompt": prompt, "max_tokens": 5, **body})


def _row(number: int, url: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"model": "any", **body}})


ROWS = [chat(i, max_tokens=5 + i % 7, n=1 + (i % 5 == 0)) for i in range(120)]


@dataclass
class EchoJob:
    """One output and the runs that lead to it."""

    root: Path
    rows: Sequence[str]
    name: str = "out.jsonl"
    options: dict[str, Any] = field(default_factory=dict)
    said: str = ""  # on the terminal, by the last run
    seer: Seer | None = None  # foretells the runs
    paused: list[float] = field(default_factory=list)  # seconds that runs would have waited before another engine

    @property
    def out(self) -> Path:
        return self.root / self.name

    @property
    def errors(self) -> Path:
        return self.root / "out.errors.jsonl"

    @property
    def state(self) -> Path:
        return folder_of(self.out)

    @property
    def report(self) -> Report:
        return read_report(self.out)

    def run(self, backend: Backend | None = None, **more: Any) -> int:
        """Run to the end, or to where the backend leads; the exit code."""
        return self._run(backend or echo_backend(), more)

    def run_mortal(self, process: type[Mortal], **more: Any) -> int:
        """The same with engine processes that die as their class says."""

        def wait(engines: Engines, seconds: float, meanwhile: Callable[[], None]) -> None:
            self.paused.append(seconds)

        with mock.patch("shoal.jobs.engines.EngineProcess", process), mock.patch.object(Engines, "wait", wait):
            return self._run(None, more)

    def _run(self, backend: Backend | None, more: dict[str, Any]) -> int:
        source = self.root / "in.jsonl"
        if not source.exists():
            source.write_text("".join(row + "\n" for row in self.rows))
        console = Console(file=io.StringIO(), width=400)
        options = JobOptions(**{"input": source, "output": self.out, **self.options, **more})
        try:
            return run_job(options, backend, console, seer=self.seer)
        finally:
            self.said = console.file.getvalue()  # type: ignore[attr-defined]

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.errors.read_text().splitlines()] if self.errors.exists() else []

    def codes(self) -> list[str]:
        """Error codes of the failed lines, in order."""
        return [line["response"]["body"]["error"]["code"] for line in self.failures()]

    def final(self) -> tuple[bytes, bytes]:
        """What the user asked for."""
        return self.out.read_bytes(), self.errors.read_bytes() if self.errors.exists() else b""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., EchoJob]:
    """Makes jobs in folders of their own."""
    made = 0

    def make(rows: list[str], **options: object) -> EchoJob:
        nonlocal made
        made += 1
        folder = tmp_path / f"job{made}"
        folder.mkdir()
        if "input" in options and str(options["input"]) != "-":
            options["input"] = folder / str(options["input"])
        return EchoJob(folder, rows, str(options.pop("name", "out.jsonl")), options)

    return make


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What a job over ROWS leaves."""
    whole = EchoJob(tmp_path_factory.mktemp("unbroken"), ROWS)
    assert whole.run() == 0
    return whole.final()


def interrupt(at: int, number: int = signal.SIGINT) -> Callable[[int], None]:
    """Send ourselves a signal at round `at`."""
    return lambda rounds: signal.raise_signal(number) if rounds == at else None


class Watched:
    """A backend that tells `look` before every round; `look` may raise, send a signal or count."""

    def __init__(self, backend: Backend, look: Callable[[int], None]) -> None:
        self._backend, self._look = backend, look
        self.rounds = 0
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.most_waiting = 0

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        taken = list(requests)
        self.submitted += taken
        self._backend.submit(taken, watched)

    def cancel(self, ids: Iterable[str]) -> None:
        taken = list(ids)
        self.cancelled += taken
        self._backend.cancel(taken)

    def outputs(self, timeout: float) -> News | None:
        self.rounds += 1
        self._look(self.rounds)
        news = self._backend.outputs(timeout)
        if news is not None:
            self.most_waiting = max(self.most_waiting, news.waiting)
        return news

    def close(self) -> None:
        self._backend.close()


class Mortal:
    """Stands for EngineProcess. A subclass says when it dies; `made` counts its instances."""

    made = 0

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        type(self).made += 1
        self.number = type(self).made
        self.pid = os.getpid()
        self.rounds = 0
        self._backend = echo_backend()

    def dies_loading(self) -> bool:
        return False

    def dies(self, running: set[int]) -> bool:
        """Whether it ends now, before it says what this round brought; `running` are input lines."""
        return False

    def begin(self, begin: Begin) -> None:
        """Nothing is built later."""

    def ready(self, timeout: float) -> Ready | None:
        if self.dies_loading():
            raise EngineDied("the engine process ended by itself (signal SIGKILL)")
        return Ready("cpu", "fp32", "ref", 1, 4096, BLOCK, 1 << 20, 8192, 0.1)

    def submit(self, requests: Iterable[Request], watched: frozenset[str] = frozenset()) -> None:
        self._backend.submit(requests, watched)

    def cancel(self, ids: Iterable[str]) -> None:
        self._backend.cancel(ids)

    def outputs(self, timeout: float) -> News | None:
        self.rounds += 1
        news = self._backend.outputs(timeout)
        running = self._backend.engine.scheduler.running.values()
        if self.dies({int(seq.request.id.split(".")[0]) for seq in running}):
            raise EngineDied("the engine process ended by itself (signal SIGKILL)")
        return news

    def close(self) -> None:
        """Nothing to end."""
