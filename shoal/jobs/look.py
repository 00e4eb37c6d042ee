"""A job's journal as others may read it: while the job runs, after it has ended, after it was killed.

It must not change what it reads, nor know how a job is run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from shoal.core.errors import StateError
from shoal.jobs.journal import NAME, SCHEMA, Status
from shoal.jobs.state import LOCK, folder_of

SUFFIX = folder_of(Path("x")).suffix
_T = TypeVar("_T")

PAGE = 4096  # rows read at once where reading keeps the job from writing


def output_of(path: Path) -> Path:
    """The output file of a job that is named by it or by its state folder."""
    return path.with_suffix("") if path.suffix == SUFFIX and path.is_dir() else path


def is_running(output: Path) -> bool:
    """Whether a run holds the folder, by the system's list of locks: to try the lock could turn away a run."""
    try:
        inode = f":{(folder_of(output) / LOCK).stat().st_ino}"
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False  # nobody can say
    return any(inode in line.split()[5][-len(inode) :] for line in lines if " FLOCK " in line and "->" not in line)


class View:
    """The journal of the job that writes `output`, read only."""

    def __init__(self, output: Path) -> None:
        """A StateError when there is none, or one that this version cannot read."""
        self.path = folder_of(output) / NAME
        if not self.path.parent.is_dir():
            raise StateError(f"no job has written {output}: there is no folder {self.path.parent}")
        if not self.path.is_file():
            raise StateError(f"{self.path} does not exist: the job has not read its input yet; run it again")
        with self._errors():
            self._database = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            self._database.execute("PRAGMA query_only=ON")
            version = int(self._database.execute("PRAGMA user_version").fetchone()[0])
            self._logged = self._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        if version != SCHEMA:
            self._database.close()
            raise StateError(
                f"{self.path} was written by another version of shoal (journal {version}, this one reads {SCHEMA}): "
                "use that version"
            )

    def meta(self, name: str) -> str | None:
        """What the job has noted under this name."""
        with self._errors():
            found = self._database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def read(self, name: str, form: type[_T]) -> _T | None:
        """The same, of this form."""
        noted = self.meta(name)
        try:
            return None if noted is None else msgspec.json.decode(noted, type=form)
        except msgspec.MsgspecError as error:
            raise StateError(f"{self.path} is damaged, or of another version of shoal ({error})") from error

    def stats(self) -> Iterator[tuple[int, Status, str]]:
        """(line, status, statistics as JSON) of the rows that have ended, in line order; all of one moment, but where
        the job has no write-ahead log: there it cannot write while we read, and so we read a page at a time."""
        query = "SELECT line, status, stats FROM results WHERE line > ? ORDER BY line LIMIT ?"
        if self._logged:
            with self._errors():
                yield from self._database.execute(query, (0, -1))
            return
        last = 0
        while page := self._page(query, last):
            yield from page
            last = page[-1][0]

    def _page(self, query: str, last: int) -> list[tuple[int, Status, str]]:
        with self._errors():
            return self._database.execute(query, (last, PAGE)).fetchall()

    def close(self) -> None:
        """Let go of the journal."""
        self._database.close()

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StateError(f"the journal {self.path} cannot be read ({error}): bring it back from a copy") from error
