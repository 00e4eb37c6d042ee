"""A job without a model, for tests of what survives: known answers, known order, counted. No engine here."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from shoal.core.clock import SimClock
from shoal.jobs.files import Files, write_whole
from shoal.jobs.journal import Status
from shoal.jobs.results import open_results
from shoal.jobs.state import Begin, Manifest, folder_of, open_state, row_key
from shoal.jobs.tables import Form
from shoal.jobs.write import Order

MANIFEST = Manifest(
    input="11" * 32,
    model={"config.json": "22" * 32, "model.safetensors": "33" * 32},
    tokenizer="44" * 32,
    template="55" * 32,
    parameters={"max_tokens": 16, "temperature": 0.0},
    weight_mode="bf16",
    kv_mode="bf16",
    instruction_set="avx2",
    versions={"shoal": "0.1.0"},
)
STATUSES: tuple[Status, ...] = ("ok", "ok", "ok", "failed", "ok", "expired", "ok", "cancelled")


@dataclass
class Job:
    """`lines` end in the order of `finish`; `generated` counts how often each was answered."""

    root: Path
    lines: Sequence[int]
    finish: Sequence[int]
    order: Order = "input"
    form: Form = "jsonl"
    seconds: float = 0.2  # between two rows
    manifest: Manifest = MANIFEST
    promises: Path | None = None  # a file that is told how many rows were said to be durable
    generated: Counter[int] = field(default_factory=Counter)

    @property
    def out(self) -> Path:
        return self.root / f"answers.{self.form}"

    @property
    def errors(self) -> Path:
        return self.root / "answers.errors.jsonl"

    def run(self, files: Files) -> int:
        """Run to the end, as `shoal run` would, and return the exit code."""
        known = self.journalled()
        clock = SimClock()
        with open_state(self.out, self.errors, files) as state:
            if state.begin(self.manifest) is Begin.FINISHED:
                code = state.exit_code()
                assert code is not None
                return code
            args = (state.path, self.out, self.errors, self.lines, self.order, files, clock, self.form)
            with open_results(*args) as results:
                for line in self.finish:
                    if results.done(line):
                        continue
                    assert line not in known, f"line {line} was journalled, and is answered again"
                    self.generated[line] += 1
                    results.put(line, self.key(line), status(line), payload(line), {"prompt_tokens": line % 7})
                    clock.advance_to(clock.now() + self.seconds)
                    results.tick(clock.now())
                    if self.promises is not None:
                        self.promises.write_text(str(results.journal.committed))
                results.finish()
                report = json.dumps({"rows": dict(sorted(results.status().counts.items()))}).encode()
                write_whole(files, state.path / "report.json", report)
            state.finish(3)
        return 3

    def key(self, line: int) -> bytes:
        return row_key(self.manifest, b"body %d" % line)

    def journalled(self) -> set[int]:
        """Return the lines in the journal, read past the code under test."""
        path = folder_of(self.out) / "journal.db"
        if not path.exists():
            return set()
        with closing(sqlite3.connect(path)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name='results'").fetchone():
                return set()
            return {int(line) for (line,) in database.execute("SELECT line FROM results")}

    def final(self) -> dict[str, bytes]:
        """Return every file that a finished job leaves, but the journal and the lock."""
        folder = folder_of(self.out)
        paths = [path for path in (*self.root.iterdir(), *folder.iterdir()) if path.is_file()]
        skipped = {"journal.db", "journal.db-wal", "journal.db-shm", "lock", "promises"}
        return {path.name: path.read_bytes() for path in paths if path.name not in skipped}


def status(line: int) -> Status:
    return STATUSES[line % len(STATUSES)]


def payload(line: int) -> bytes:
    """Return a line of 20 to 80 bytes that only its number decides."""
    random = Random(line)
    return json.dumps({"line": line, "text": "é" * random.randrange(4) + "x" * random.randrange(50)}).encode()


def shuffled(lines: Sequence[int], seed: int, window: int = 8) -> list[int]:
    """Return the lines in an order in which a batch could finish them: at most about `window` out of place."""
    random = Random(seed)
    return sorted(lines, key=lambda line: line + random.random() * window)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Give a folder in memory where there is any: these tests sync thousands of times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)
