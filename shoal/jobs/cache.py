"""Answers kept across files and runs, by what decides them. It must not know rows, nor what an answer costs.

One SQLite database in a folder that any number of jobs may use at once. An entry is one sample of one request; its
address is a hash over the engine, the request and the sample's number, so that no entry is ever out of date. A cache is
never needed: what it does not hold, or what is damaged in it, is computed.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from shoal.core.errors import UsageError
from shoal.core.types import TOKEN, Tokens, TokenScore
from shoal.jobs.answer import Sample
from shoal.jobs.files import disk_errors, on_network, read_mounts

NAME = "answers-2.db"  # the number is that of the entries' form
CHECK = 16  # bytes of an entry's checksum
PENDING_ENTRIES = 256
PENDING_SECONDS = 0.5
PATIENCE = 10.0  # seconds to wait for another job's writing
DAY = 86400

_TABLES = """
CREATE TABLE IF NOT EXISTS entries(address BLOB PRIMARY KEY, used INTEGER NOT NULL, value BLOB NOT NULL);
"""
_Score = tuple[int, float, int, tuple[tuple[int, float], ...]]


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    text: str
    tokens: bytes
    finish: Literal["stop", "length"]
    stop_reason: int | str | None
    logprobs: list[_Score]
    scores: list[_Score]
    vector: bytes  # float32, as the machine has them
    usage: tuple[int, int] | None = None  # entries of before have none


@dataclass(frozen=True, slots=True)
class Kept:
    """One sample, and with the first one the scores of its prompt."""

    sample: Sample
    scores: Sequence[TokenScore] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Entry)


def pack(kept: Kept) -> bytes:
    """The sample as bytes: the same for the same sample."""
    sample = kept.sample
    return _encoder.encode(
        _Entry(
            sample.text,
            sample.tokens.tobytes(),
            sample.finish,
            sample.stop_reason,
            [(s.token, s.logprob, s.rank, s.top) for s in sample.logprobs],
            [(s.token, s.logprob, s.rank, s.top) for s in kept.scores],
            array("f", sample.vector).tobytes(),
            sample.usage,
        )
    )


def unpack(data: bytes) -> Kept:
    """What `pack` made into bytes."""
    entry = _decoder.decode(data)
    tokens: Tokens = _numbers(TOKEN, entry.tokens)
    logprobs = [TokenScore(*score) for score in entry.logprobs]
    vector = _numbers("f", entry.vector) if entry.vector else ()
    sample = Sample(entry.text, tokens, entry.finish, entry.stop_reason, logprobs, vector, entry.usage)
    return Kept(sample, [TokenScore(*score) for score in entry.scores])


def _numbers(code: str, data: bytes) -> array[Any]:
    found = array(code)
    found.frombytes(data)
    return found


class AnswerCache:
    """The entries that one engine may use. Changed by the job's loop alone.

    The first error of the database ends its use: `trouble` says why, nothing is found from then on, and nothing kept.
    """

    def __init__(self, folder: Path, engine: str) -> None:
        """`engine` is the hash of all that turns a request into an answer. A folder that cannot be is a UsageError."""
        self.folder = folder
        self.trouble, self._said = "", False
        self.damaged = 0  # entries that were found and not served
        self._engine = bytes.fromhex(engine)[:64]
        self._today = int(time.time() // DAY)
        self._pending: dict[bytes, bytes] = {}
        self._touched: list[bytes] = []
        self._since = 0.0
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._database: sqlite3.Connection | None = None
        with self._careful():
            self._database = _connect(folder)

    def get(self, ask: bytes, sample: int) -> Kept | None:
        """The sample of this number for a request with this key; None when it is not there, or damaged."""
        address = self._address(ask, sample)
        found: tuple[int, bytes] | None = None
        if address in self._pending:
            found = self._today, self._pending[address]
        elif self._database is not None:
            with self._careful():
                query = "SELECT used, value FROM entries WHERE address=?"
                found = self._database.execute(query, (address,)).fetchone()
        if found is None:
            return None
        used, value = found
        if not isinstance(value, bytes) or value[:CHECK] != _check(address, value[CHECK:]):
            self._remove_damaged(address)
            return None
        if used != self._today:
            self._touched.append(address)
        return unpack(value[CHECK:])

    def put(self, ask: bytes, sample: int, kept: Kept, now: float) -> None:
        """Keep a complete sample; it is there for others after the next flush."""
        if self._database is None:
            return
        if not self._pending:
            self._since = now
        address = self._address(ask, sample)
        data = pack(kept)
        self._pending[address] = _check(address, data) + data
        if len(self._pending) >= PENDING_ENTRIES:
            self.flush()

    def forget(self, ask: bytes, sample: int) -> None:
        """Remove an entry that was found to be wrong."""
        address = self._address(ask, sample)
        self._pending.pop(address, None)
        if self._database is not None:
            with self._careful(), self._database:
                self._database.execute("DELETE FROM entries WHERE address=?", (address,))

    def complaint(self) -> str:
        """Why the cache is of no use, once."""
        said, self._said = ("" if self._said else self.trouble), self._said or bool(self.trouble)
        return said

    def tick(self, now: float) -> None:
        """Flush what has waited long enough; call it a few times a second."""
        if self._pending and now - self._since >= PENDING_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the database, in one short transaction."""
        if self._database is not None and (self._pending or self._touched):
            rows = [(address, self._today, value) for address, value in self._pending.items()]
            with self._careful(), self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
                used = ((self._today, address) for address in self._touched)
                self._database.executemany("UPDATE entries SET used=? WHERE address=?", used)
        self._pending.clear()
        self._touched.clear()

    def close(self) -> None:
        """Flush and close; may be called twice."""
        self.flush()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _address(self, ask: bytes, sample: int) -> bytes:
        return hashlib.blake2b(ask + b"%d" % sample, digest_size=20, key=self._engine).digest()

    def _remove_damaged(self, address: bytes) -> None:
        self.damaged += 1
        if self._database is not None:
            with self._careful(), self._database:
                self._database.execute("DELETE FROM entries WHERE address=?", (address,))

    @contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.trouble = f"the cache in {self.folder} cannot be used ({error}); the job goes on without it"
            if self._database is not None:
                self._database.close()
            self._database = None


def _settle_journal(database: sqlite3.Connection, kind: str) -> None:
    """Have the database kept in this way. SQLite does not wait for others here, as it does everywhere else."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            database.execute(f"PRAGMA journal_mode={kind}").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _connect(folder: Path) -> sqlite3.Connection:
    database = sqlite3.connect(folder / NAME, timeout=PATIENCE, isolation_level=None)
    database.text_factory = bytes  # a value that has become a text is damaged, and no error of the database
    network = on_network(folder, read_mounts())
    # A write-ahead log needs memory shared between processes, which network file systems do not give.
    _settle_journal(database, "DELETE" if network else "WAL")
    database.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last entries, and no more
    database.execute(_TABLES)
    return database


def _check(address: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(address + data, digest_size=CHECK).digest()


# -- looking after it ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """How much a cache holds. Entries not used for long are the first to go when it is pruned."""

    entries: int
    size: int  # bytes of all entries; the file has a little more
    oldest: int  # days since the entry that was not used for longest was


def look(folder: Path) -> CacheFacts:
    """What a cache holds. A UsageError when there is none."""
    with closing(_opened(folder)) as database, _told(folder):
        query = "SELECT count(*), total(length(value)), min(used) FROM entries"
        entries, size, oldest = database.execute(query).fetchone()
    return CacheFacts(entries, int(size), 0 if oldest is None else max(0, int(time.time() // DAY) - oldest))


def prune(folder: Path, size: int) -> CacheFacts:
    """Remove the entries that were not used for longest, until the rest has at most `size` bytes."""
    with closing(_opened(folder)) as database, _told(folder):
        total, last = 0, None
        for number, used, length in database.execute(
            "SELECT rowid, used, length(value) FROM entries ORDER BY used DESC, rowid DESC"
        ):
            total += length
            if total > size:
                last = used, number
                break
        if last is not None:
            database.execute("DELETE FROM entries WHERE (used, rowid) <= (?, ?)", last)
        database.execute("VACUUM")
    return look(folder)


def _opened(folder: Path) -> sqlite3.Connection:
    if not (folder / NAME).is_file():
        raise UsageError(f"there is no cache in {folder}: `shoal run --cache {folder}` makes one")
    with _told(folder):
        return _connect(folder)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UsageError(
            f"the cache in {folder} cannot be used ({error}): wait for the jobs that use it, or remove it"
        ) from error
