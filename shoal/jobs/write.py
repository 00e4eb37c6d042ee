"""From the journal to the output and errors files, line after line. It must not know what a line says or who made it.

A line is appended only after its row is committed in the journal, so whatever a crash leaves behind the last
checkpoint can be thrown away and written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.core.errors import ShoalError, StateError
from shoal.jobs.files import MISSING, File, Files, disk_errors
from shoal.jobs.journal import Journal, Row, Written

Order = Literal["input", "finish"]

CHECKPOINT_SECONDS = 5.0
CHECKPOINT_BYTES = 16 << 20
_CHUNK = 1 << 20  # bytes gathered before one write, and read at once when comparing
_FETCH = 4096  # rows looked for ahead


class Target:
    """One output file: its place on disk, how much of it is written, and the bytes not yet handed over."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.size = 0  # bytes written, buffer included
        self._files = files
        self._file: File | None = None
        self._nameless = False  # made, but its name is not durable yet
        self._buffer: list[bytes] = []
        self._held = 0

    @property
    def file(self) -> File:
        """The open file; made when it is missing."""
        if self._file is None:
            self._nameless = self._files.size(self.path) == MISSING
            self._file = self._files.open(self.path)
        return self._file

    def append(self, line: bytes) -> None:
        """Add a line (without its newline)."""
        self._buffer += (line, b"\n")
        self._held += len(line) + 1
        self.size += len(line) + 1
        if self._held >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Hand what is gathered to the file."""
        if self._held:
            with disk_errors(self.path):
                self.file.write(self.size - self._held, b"".join(self._buffer))
            self._buffer, self._held = [], 0

    def sync(self) -> None:
        """Make all of it durable; somebody else's hand in the file is a StateError."""
        self.flush()
        with disk_errors(self.path):
            if self._file is None:
                return
            self._file.sync()
            if self._nameless:
                self._files.sync_folder(self.path.parent)
                self._nameless = False
            there = self._files.size(self.path)
        if there != self.size:
            raise foreign(self.path, min(max(there, 0), self.size), "it was changed while the job was writing it")

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        with disk_errors(self.path):
            if self._files.size(self.path) != MISSING or size:
                self.file.truncate(size)
        self.size = size

    def moved(self, path: Path) -> None:
        """The file has another name now."""
        self.path = path

    def close(self) -> None:
        """Close the file; what was not flushed is left out."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Comparison:
    """Holds a file against the bytes the journal says it must have, in order."""

    def __init__(self, target: Target, files: Files, safe: int) -> None:
        """The first `safe` bytes must be there; behind them a crash may have left anything it can leave."""
        self._target = target
        self._safe = safe
        self._offset = 0
        self._buffer = bytearray()
        with disk_errors(target.path):
            there = files.size(target.path)
        self._size = max(there, 0)
        if self._size < safe:
            what = "it is missing" if there == MISSING else f"it ends there, but {safe} bytes were written"
            raise foreign(target.path, self._size, what)

    def expect(self, line: bytes) -> None:
        """Add what must come next."""
        self._buffer += line
        self._buffer += b"\n"
        if len(self._buffer) >= _CHUNK:
            self._compare()

    def finish(self) -> None:
        """Compare the rest; bytes beyond it are somebody else's."""
        self._compare()
        if self._size > self._offset:
            raise foreign(self._target.path, self._offset, f"{self._size - self._offset} more bytes follow")

    def _compare(self) -> None:
        want = bytes(self._buffer)
        self._buffer.clear()
        start, self._offset = self._offset, self._offset + len(want)
        if start >= self._size:
            return
        with disk_errors(self._target.path):
            have = self._target.file.read(start, len(want))
        if have == want[: len(have)]:
            return
        for place, (old, new) in enumerate(zip(have, want, strict=False), start):
            # Power cuts leave zeros where a written block never reached the disk; any other byte was put there.
            if old != new and (place < self._safe or old != 0):
                raise foreign(self._target.path, place, "it differs from what was written")


def foreign(path: Path, offset: int, what: str) -> StateError:
    """Return the error for an output that is not as it was left, from byte `offset` on."""
    return StateError(
        f"{path} was edited or replaced: at byte {offset} {what}. Bring the file back as it was, "
        "start over with --restart, or choose another output"
    )


@dataclass(slots=True)
class Writer:
    """Appends ended rows to the output (ok) and errors (all others) files. Changed by Results alone.

    `lines` are the input's row lines, ascending; without `errors` every line goes to `out`, without `out` only
    failed rows are written here. Work it with `advance` after each commit and `checkpoint` now and then.
    """

    journal: Journal
    lines: Sequence[int]
    order: Order
    out: Target | None
    errors: Target | None
    rows: int = 0  # written, in writing order
    _last: Written = Written()
    _since: float | None = None  # when the oldest bytes behind the checkpoint were written

    def repair(self, files: Files) -> None:
        """Bring both files back to the last checkpoint; what follows it is written again by `advance`.

        A file that a crash cannot have left like this is a StateError naming the byte where it differs.
        """
        self._last = self.journal.written()
        compared = [
            (target, Comparison(target, files, safe))
            for target, safe in ((self.out, self._last.out_bytes), (self.errors, self._last.errors_bytes))
            if target is not None
        ]
        by_target = {id(target): comparison for target, comparison in compared}
        for row in self._ready(0):
            target = self._target(row)
            if target is not None:
                by_target[id(target)].expect(row.payload)
        for target, comparison in compared:
            comparison.finish()
            target.cut(self._last.out_bytes if target is self.out else self._last.errors_bytes)
            with disk_errors(target.path):
                if target is self.out:  # the errors file appears with its first line
                    target.file.sync()
        self.rows = self._last.rows

    def advance(self, now: float) -> None:
        """Append every committed row whose turn has come."""
        before = self.rows
        for row in self._ready(self.rows):
            target = self._target(row)
            if target is not None:
                target.append(row.payload)
            self.rows += 1
        for target in self._targets():
            target.flush()
        if self._since is None and self.rows > before:
            self._since = now

    def due(self, now: float) -> bool:
        """Whether so much hangs in the air that a checkpoint is wanted."""
        held = sum(target.size for target in self._targets()) - self._last.out_bytes - self._last.errors_bytes
        return self._since is not None and (now - self._since >= CHECKPOINT_SECONDS or held >= CHECKPOINT_BYTES)

    def checkpoint(self) -> None:
        """Make both files durable and note their lengths in the journal."""
        for target in self._targets():
            target.sync()
        now = Written(
            self.rows, self.out.size if self.out is not None else 0, self.errors.size if self.errors is not None else 0
        )
        if now != self._last:
            self.journal.commit(now)
            self._last = now
        self._since = None

    def moved(self, out: Path | None, errors: Path | None) -> None:
        """The files have these names now."""
        for target, path in ((self.out, out), (self.errors, errors)):
            if target is not None and path is not None:
                target.moved(path)

    def ended(self) -> Iterator[Row]:
        """Yield the committed rows in writing order, up to the first that is missing."""
        return self._ready(0)

    @property
    def waiting_for(self) -> int | None:
        """The line that must end before more can be written; None when all is written, or none holds back others."""
        if self.order == "finish" or self.rows == len(self.lines):
            return None
        return int(self.lines[self.rows])

    def close(self) -> None:
        """Close both files as they are."""
        for target in self._targets():
            target.close()

    def _targets(self) -> list[Target]:
        return [target for target in (self.out, self.errors) if target is not None]

    def _target(self, row: Row) -> Target | None:
        return self.out if row.status == "ok" or self.errors is None else self.errors

    def _ready(self, start: int) -> Iterator[Row]:
        """Yield the ended rows from number `start` on, in writing order, up to the first that is missing."""
        if self.order == "finish":
            yield from self.journal.by_turn(start, self.journal.counts.total())
            return
        while start < len(self.lines) and self.journal.done(int(self.lines[start])):
            stop = start + 1
            while stop < len(self.lines) and stop - start < _FETCH and self.journal.done(int(self.lines[stop])):
                stop += 1
            expected = iter(range(start, stop))
            for row in self.journal.by_line(int(self.lines[start]), int(self.lines[stop - 1])):
                if row.line != int(self.lines[next(expected)]):
                    raise ShoalError(f"the journal {self.journal.path} has a result for line {row.line}, not a row")
                yield row
            if (missing := next(expected, None)) is not None:
                raise ShoalError(f"the journal {self.journal.path} has lost line {int(self.lines[missing])}")
            start = stop
