"""The durable half of a job in one object: take a row's result, say what has ended, end the files. No engine here.

Order of truth: the journal commits, then the files are appended, then both are synced and the journal notes how far.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shoal.core.clock import Clock
from shoal.core.errors import ShoalError, StateError
from shoal.jobs.files import Files, whole
from shoal.jobs.journal import Journal, Status
from shoal.jobs.swap import Swap
from shoal.jobs.tables import Form, write_table
from shoal.jobs.write import Order, Target, Writer

ROWS_NAME = "rows.jsonl"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: rows answered (committed or about to be), written, and the line that holds back the rest."""

    total: int
    answered: int
    written: int
    waiting_for: int | None
    counts: Mapping[Status, int]

    def __str__(self) -> str:
        text = f"answered {self.answered}, written {self.written}"
        return text if self.waiting_for is None else f"{text}, waiting for line {self.waiting_for}"


class Results:
    """The journal and the output files of one job. Changed by the one thread that made it.

    After any error it is of no more use: close it and open another.
    """

    def __init__(
        self, journal: Journal, writer: Writer, files: Files, clock: Clock, out: Path, errors: Path | None,
        form: Form, swap: Swap,
    ) -> None:  # fmt: skip
        self.journal = journal
        self._writer = writer
        self._swap = swap
        self._files = files
        self._clock = clock
        self._out, self._errors = out, errors
        self._form = form
        self._broken = False

    def done(self, line: int) -> bool:
        """Whether the row of this input line has ended."""
        return self.journal.done(line)

    def put(self, line: int, key: bytes, status: Status, payload: bytes, stats: Mapping[str, object]) -> None:
        """Take a row's result: `payload` is its finished line. The same again changes nothing, another is an error."""
        with self._careful():
            now = self._clock.now()
            self.journal.put(line, key, status, payload, stats, now)
            if self.journal.due(now):
                self._commit(now)

    def died(self, lines: Iterable[int]) -> list[int]:
        """Count a death of the engine for the rows in flight; return those that must end as `engine_died`."""
        with self._careful():
            return self.journal.died(line for line in lines if not self.journal.done(line))

    def tick(self, now: float) -> None:
        """Commit and write what is due at `now`; call it a few times a second."""
        with self._careful():
            if self.journal.due(now):
                self._commit(now)
            if self._writer.due(now):
                self._writer.checkpoint()

    def keep(self) -> None:
        """Make durable and write what was put so far, now."""
        with self._careful():
            self._commit(self._clock.now())

    def status(self) -> Progress:
        """Return how far the job is."""
        counts = self.journal.counts
        return Progress(len(self._writer.lines), counts.total(), self._writer.rows, self._writer.waiting_for, counts)

    def finish(self) -> Progress:
        """Complete all files, once every row has ended. May be called again after a crash in it."""
        with self._careful():
            self._commit(self._clock.now())
            progress = self.status()
            if progress.answered != progress.total or progress.written != progress.total:
                raise ShoalError(f"the job cannot be finished: {progress} of {progress.total} rows; run it again")
            self._writer.checkpoint()
            if self._form != "jsonl":
                ended = self._writer.ended
                write_table(
                    self._form, self._files, self._out, lambda: (r.payload for r in ended() if r.status == "ok")
                )
            self._write_rows()
            self._swap.finish()
            self._writer.moved(self._out if self._form == "jsonl" else None, self._errors)
            return progress

    def forget(self, lines: Sequence[int]) -> None:
        """Forget these lines, which are answered again beside the files of before. Then close this and open another."""
        with self._careful():
            self._commit(self._clock.now())
            self._writer.checkpoint()
            self._swap.begin(lines)
        self._broken = True  # what it knows is of before: nothing of it may be written

    def close(self) -> None:
        """Keep all that was put, durably, and close. After an error, only what was committed before it."""
        try:
            if not self._broken:
                with self._careful():
                    self._commit(self._clock.now())
                    self._writer.checkpoint()
        finally:
            self._writer.close()
            self.journal.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commit(self, now: float) -> None:
        self.journal.commit()
        self._writer.advance(now)

    def _write_rows(self) -> None:
        """Write the state folder's rows.jsonl: each row's statistics, which are no part of its output line."""
        with whole(self._files, self.journal.path.with_name(ROWS_NAME)) as file:
            offset, chunk = 0, bytearray()
            for line, status, stats in self.journal.stats():
                chunk += json.dumps(
                    {"line": line, "status": status, **json.loads(stats)}, separators=(",", ":")
                ).encode()
                chunk += b"\n"
                if len(chunk) >= _CHUNK:
                    file.write(offset, bytes(chunk))
                    offset += len(chunk)
                    chunk.clear()
            file.write(offset, bytes(chunk))

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """After an error nobody can say what reached the disk: a sync that failed may succeed when tried again."""
        if self._broken:
            raise ShoalError(f"the journal {self.journal.path} had an error before; run the same command again")
        self._broken = True
        yield
        self._broken = False


def open_results(
    folder: Path,
    out: Path,
    errors: Path | None,
    lines: Sequence[int],
    order: Order,
    files: Files,
    clock: Clock,
    form: Form = "jsonl",
) -> Results:
    """Open the results of the job in `folder`, new or continued, and bring its files in order.

    `lines` are the numbers of the input lines that are rows, ascending (a range, an array). Failed rows go to
    `errors`, or to `out` when that is None. `form` other than jsonl is written as a whole at the end. Files that
    were edited meanwhile, a damaged journal or another order than before are a StateError.
    """
    journal = Journal(folder)
    done = False
    try:
        was = journal.meta("order")
        if was is None:
            journal.set_meta("order", order)
        elif was != order:
            raise StateError(
                f"{out} was begun with --order {was}, not {order}: go on with that, start over with --restart, "
                "or choose another output"
            )
        if form != "jsonl" and errors is None:
            raise ShoalError(f"{out} holds answers only; the failed rows need a file of their own")
        swap = Swap(journal, files, out if form == "jsonl" else None, errors)
        swap.mend()
        target = Target(swap.place(out), files) if form == "jsonl" else None
        failed = Target(swap.place(errors), files) if errors is not None else None
        writer = Writer(journal, lines, order, target, failed)
        writer.repair(files)
        writer.advance(clock.now())
        done = True
    finally:
        if not done:
            journal.close()
    return Results(journal, writer, files, clock, out, errors, form, swap)
