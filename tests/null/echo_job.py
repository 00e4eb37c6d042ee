"""The main job in one process over the real scheduler and an engine that hashes: what its tests share.

It must not know what a test wants to see; backends here break in ways that tests choose.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from shoal.client import Backend, InProcess, News
from shoal.core.clock import SimClock
from shoal.core.types import Request
from shoal.engine import Engine
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


@dataclass
class EchoJob:
    """One output and the runs that lead to it."""

    root: Path
    rows: Sequence[str]
    name: str = "out.jsonl"
    options: dict[str, Any] = field(default_factory=dict)
    said: str = ""  # on the terminal, by the last run

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
        source = self.root / "in.jsonl"
        if not source.exists():
            source.write_text("".join(row + "\n" for row in self.rows))
        console = Console(file=io.StringIO(), width=400)
        options = JobOptions(**{"input": source, "output": self.out, **self.options, **more})
        try:
            return run_job(options, backend or echo_backend(), console)
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
