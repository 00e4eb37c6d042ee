"""Which rows have ended, and how: the truth of a job, in one SQLite database. It must not know the output files.

A row that `commit` has returned for survives a power cut. The journal is changed by its one owner (Results) alone;
anyone may read the database meanwhile.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from shoal.core.errors import ShoalError, StateError
from shoal.jobs.files import on_network, read_mounts

Status = Literal["ok", "failed", "expired", "cancelled"]

NAME = "journal.db"
SCHEMA = 1
COMMIT_ROWS = 256
COMMIT_SECONDS = 0.5
DEATHS_ALLOWED = 1  # a row in flight at one more death of the engine is not tried again

_APPLICATION = 0x5348_4F41
_TABLES = """
CREATE TABLE results(line INTEGER PRIMARY KEY, turn INTEGER NOT NULL, status TEXT NOT NULL, key BLOB NOT NULL,
                     stats TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE deaths(line INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE written(id INTEGER PRIMARY KEY CHECK (id = 1), rows INTEGER NOT NULL, out_bytes INTEGER NOT NULL,
                     errors_bytes INTEGER NOT NULL);
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO written VALUES (1, 0, 0, 0);
"""
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT})


@dataclass(frozen=True, slots=True)
class Row:
    """One ended row. `payload` is its finished output or error line, without the newline."""

    line: int  # in the input, from 1
    status: Status
    payload: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """How far both files are known to be on the disk: rows in writing order, and the files' sizes after them."""

    rows: int = 0
    out_bytes: int = 0
    errors_bytes: int = 0


class Journal:
    """The results of one job, by input line.

    Results are gathered in memory until `commit`: at the latest when `due` says so.
    """

    def __init__(self, folder: Path, mounts: str | None = None) -> None:
        """Open the journal in `folder`, or make it there. A damaged or foreign database is a StateError."""
        self.path = folder / NAME
        self.counts: Counter[Status] = Counter()
        self._network = on_network(folder, read_mounts() if mounts is None else mounts)
        self._bits = bytearray()
        self._pending: dict[int, tuple[int, int, Status, bytes, str, bytes]] = {}
        self._notes: dict[str, str] = {}  # for the next commit
        self._since = 0.0  # when the oldest pending row came
        with self._errors():
            self._database = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            self._open()
            for line, status in self._database.execute("SELECT line, status FROM results"):
                self._mark(line, status)

    def _open(self) -> None:
        database = self._database
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        application = int(database.execute("PRAGMA application_id").fetchone()[0])
        if version != SCHEMA and (version, application) != (0, 0):
            raise StateError(
                f"{self.path} was written by another version of shoal (journal {version}, this one is {SCHEMA}): "
                "finish the job with that version, or start over with --restart"
            )
        # A write-ahead log needs memory shared between processes, which network file systems do not give.
        database.execute("PRAGMA journal_mode=" + ("DELETE" if self._network else "WAL")).fetchone()
        database.execute("PRAGMA synchronous=EXTRA")  # FULL, and the removal of a rollback journal is synced as well
        database.execute("PRAGMA wal_autocheckpoint=4000")
        if version == 0:
            database.execute("BEGIN IMMEDIATE")
            for statement in _TABLES.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA application_id={_APPLICATION}")
            database.execute(f"PRAGMA user_version={SCHEMA}")
            database.execute("COMMIT")
        # What a failed sync left in the log may be in memory only: this writes it again, to the database itself.
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    @property
    def network(self) -> bool:
        """Whether the folder is on a network file system, so that a rollback journal is used."""
        return self._network

    @property
    def committed(self) -> int:
        """How many rows are durable."""
        return self.counts.total() - len(self._pending)

    def done(self, line: int) -> bool:
        """Whether the line has ended (committed or about to be)."""
        byte = line >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (line & 7) & 1)

    def ended(self, lines: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the row of each of these lines has ended."""
        bits = np.unpackbits(np.frombuffer(self._bits, dtype=np.uint8), bitorder="little")
        found = np.zeros(len(lines), dtype=np.bool_)
        known = lines < len(bits)
        found[known] = bits[lines[known]] > 0
        return found

    def put(
        self, line: int, key: bytes, status: Status, payload: bytes, stats: Mapping[str, object], now: float
    ) -> bool:
        """Take the result of a line; it is kept once `commit` has returned. False when it was there already.

        `key` is the hash of all that decides the result. Another key or result for the same line is an error.
        """
        if self.done(line):
            self._same(line, key, status, payload)
            return False
        if b"\n" in payload:
            raise ValueError(f"the result of line {line} is not one line")
        if not self._pending:
            self._since = now
        turn = self.counts.total()
        self._pending[line] = (line, turn, status, key, json.dumps(stats, separators=(",", ":")), payload)
        self._mark(line, status)
        return True

    def _mark(self, line: int, status: Status) -> None:
        byte = line >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 4096 - len(self._bits)))
        self._bits[byte] |= 1 << (line & 7)
        self.counts[status] += 1

    def _same(self, line: int, key: bytes, status: Status, payload: bytes) -> None:
        pending = self._pending.get(line)
        if pending is not None:
            old = (pending[3], pending[2], pending[5])
        else:
            with self._errors():
                old = self._database.execute(
                    "SELECT key, status, payload FROM results WHERE line=?", (line,)
                ).fetchone()
        if old != (key, status, payload):
            what = "under another key" if old[0] != key else "differently"
            raise ShoalError(
                f"line {line} was answered before, {what}; the first answer is kept. One of the two is wrong: "
                "please report this with the state folder; --restart starts over"
            )

    def due(self, now: float) -> bool:
        """Whether the pending rows must be committed now."""
        waiting = bool(self._pending) and now - self._since >= COMMIT_SECONDS
        return waiting or len(self._pending) >= COMMIT_ROWS

    def commit(self, written: Written | None = None) -> None:
        """Make all pending rows and notes durable, and with them how far the files are written."""
        if not self._pending and not self._notes and written is None:
            return
        with self._transaction() as database:
            database.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)", self._pending.values())
            if written is not None:
                database.execute(
                    "UPDATE written SET rows=?, out_bytes=?, errors_bytes=?",
                    (written.rows, written.out_bytes, written.errors_bytes),
                )
            database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", self._notes.items())
        self._pending.clear()
        self._notes.clear()

    def died(self, lines: Iterable[int]) -> list[int]:
        """Count an engine's death for the rows that were in flight; return those that must not be tried again."""
        with self._transaction() as database:
            over = []
            for line in lines:
                (count,) = database.execute(
                    "INSERT INTO deaths VALUES (?, 1) ON CONFLICT(line) DO UPDATE SET count=count+1 RETURNING count",
                    (line,),
                ).fetchall()[0]
                if count > DEATHS_ALLOWED:
                    over.append(line)
        return over

    def reopen(self, lines: Iterable[int], name: str, value: str) -> None:
        """Forget the results of these lines, and how far the files are written; keep `value` under `name`. All of it
        durably or nothing. Close the journal then: what it counts is of before."""
        with self._transaction() as database:
            which = [(line,) for line in lines]
            database.executemany("DELETE FROM results WHERE line=?", which)
            database.executemany("DELETE FROM deaths WHERE line=?", which)
            database.execute("DROP INDEX IF EXISTS turns")  # turns are counted without gaps, and double meanwhile
            database.execute(
                "UPDATE results SET turn=ranked.number FROM (SELECT line, row_number() OVER (ORDER BY turn) - 1 AS "
                "number FROM results) AS ranked WHERE ranked.line=results.line"
            )
            database.execute("UPDATE written SET rows=0, out_bytes=0, errors_bytes=0")
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def written(self) -> Written:
        """Return the last checkpoint."""
        with self._errors():
            return Written(*self._database.execute("SELECT rows, out_bytes, errors_bytes FROM written").fetchone())

    def by_line(self, first: int, last: int) -> Iterator[Row]:
        """Yield the committed rows of lines first … last, in line order."""
        return self._rows("line", first, last)

    def by_turn(self, first: int, last: int) -> Iterator[Row]:
        """Yield the committed rows that ended as number first … last (from 0), in that order."""
        with self._errors():
            self._database.execute("CREATE UNIQUE INDEX IF NOT EXISTS turns ON results(turn)")
        return self._rows("turn", first, last)

    def _rows(self, column: str, first: int, last: int) -> Iterator[Row]:
        query = f"SELECT line, status, payload FROM results WHERE {column} BETWEEN ? AND ? ORDER BY {column}"
        with self._errors():
            for line, status, payload in self._database.execute(query, (first, last)):
                yield Row(line, status, payload)

    def stats(self) -> Iterator[tuple[int, Status, str]]:
        """Yield (line, status, statistics as JSON) of the committed rows in line order."""
        with self._errors():
            yield from self._database.execute("SELECT line, status, stats FROM results ORDER BY line")

    def noted(self, name: str) -> list[int]:
        """Return the committed lines whose statistics have this name, ascending."""
        query = "SELECT line FROM results WHERE json_type(stats, ?) IS NOT NULL ORDER BY line"
        with self._errors():
            return [line for (line,) in self._database.execute(query, (f'$."{name}"',))]

    def payload(self, line: int) -> bytes | None:
        """Return the committed result of a line; None when it has none."""
        with self._errors():
            found = self._database.execute("SELECT payload FROM results WHERE line=?", (line,)).fetchone()
        return None if found is None else bytes(found[0])

    def meta(self, name: str) -> str | None:
        """Return what `set_meta` kept under this name."""
        with self._errors():
            found = self._database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def set_meta(self, name: str, value: str) -> None:
        """Keep a value under a name, durably, now."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def note(self, name: str, value: str) -> None:
        """Keep a value under a name with the next commit, which may be a while off."""
        self._notes[name] = value

    def close(self) -> None:
        """Close the database. Rows that were not committed are gone."""
        with self._errors():
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGE:
                raise StateError(
                    f"the journal {self.path} is damaged ({error}): bring it back from a copy to continue, or start "
                    "over with --restart; the lines already in the output are whole, keep a copy of it if you need them"
                ) from error
            raise ShoalError(
                f"the journal {self.path} cannot be used ({error}): nothing committed is lost; "
                "make room or mend the disk, then run the same command again to continue"
            ) from error
