"""The main job in one process, with an engine that only hashes: for tests of what the whole of it leaves on disk."""

from __future__ import annotations

import io
import json
import sqlite3
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from unittest import mock
from zlib import crc32

from rich.console import Console

from shoal.client import News
from shoal.core.types import Finish, Output, Request
from shoal.jobs.files import Files
from shoal.jobs.options import JobOptions
from shoal.jobs.run import run_job
from shoal.jobs.state import folder_of

TIMING = dict.fromkeys(("arrival", "start", "first", "end", "cached", "preemptions"), 0.0)


class EchoBackend:
    """Answers every request with tokens that its prompt and sample index decide, a few requests at a time."""

    def __init__(self, known: set[int], generated: Counter[int]) -> None:
        self._known, self._generated = known, generated
        self._waiting: deque[Request] = deque()

    def submit(self, requests: Iterable[Request], watched: frozenset[str]) -> None:
        for request in requests:
            line = int(request.id.split(".")[0])
            assert line not in self._known, f"line {line} was journalled, and is answered again"
            self._generated[line] += 1
            self._waiting.append(request)

    def cancel(self, ids: Iterable[str]) -> None:
        """Nothing runs for longer than a call."""

    def outputs(self, timeout: float) -> News | None:
        taken = [self._waiting.popleft() for _ in range(min(3, len(self._waiting)))]
        if not taken:
            return None
        outputs = []
        for request in taken:
            seed = crc32(request.prompt.tobytes(), request.sampling.sample)
            tokens = list(array("i", (300 + (seed >> shift) % 512 for shift in range(request.sampling.max_tokens))))
            outputs.append(Output(request.id, tokens, Finish.LENGTH, timing=TIMING))
        return News(tuple(outputs), tuple(request.id for request in taken))

    def close(self) -> None:
        """Nothing to end."""


class SteppingClock:
    """Every look at it is a quarter of a second later."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 0.25
        return self._now


class WholeJob:
    """What durable_job.Job is, with reading, planning, answering and reporting as users have them."""

    def __init__(self, root: Path, rows: int) -> None:
        self.root = root
        self.rows = rows
        self.out = root / "answers.jsonl"
        self.generated: Counter[int] = Counter()

    def run(self, files: Files) -> int:
        """Run to the end and return the exit code. The input lies beside `root`, where no fault reaches it."""
        source = self.root.with_name(f"rows{self.rows}.jsonl")
        if not source.exists():
            source.write_text("".join(line(number) + "\n" for number in range(1, self.rows + 1)))
        options = JobOptions(source, self.out, quiet=True)
        console = Console(file=io.StringIO())
        with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
            return run_job(options, EchoBackend(self.journalled(), self.generated), console)

    def journalled(self) -> set[int]:
        """The lines in the journal, read past the code under test."""
        path = folder_of(self.out) / "journal.db"
        if not path.exists():
            return set()
        with closing(sqlite3.connect(path)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name='results'").fetchone():
                return set()
            return {int(line) for (line,) in database.execute("SELECT line FROM results")}

    def final(self) -> dict[str, bytes]:
        """The files that users asked for, and how the job ended."""
        paths = (*self.root.glob("answers*.jsonl"), folder_of(self.out) / "finished.json")
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def line(number: int) -> str:
    """A row, or one of the lines that are none. From the eleventh on a row asks for what an earlier one asks for."""
    if number % 5 == 3:
        return '{"custom_id": "broken'
    if number % 7 == 6:
        return ""
    kind = number % 10
    content = f"Question {kind} about {'the same thing ' * (kind % 3)}"
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2 + kind % 3, "n": 1 + kind % 2}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
