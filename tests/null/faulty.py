"""A file layer that crashes, or refuses, at a chosen operation. It knows what a disk may forget, not who writes.

Everything is done on the real file system as well, so that readers see it; `crash` then puts there what a machine
that stopped at that moment might find after its restart.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from shoal.jobs.files import DiskFiles, File

Loss = Literal["lost", "half", "scattered", "kept"]  # what becomes of what was not synced
LOSSES: tuple[Loss, ...] = ("lost", "half", "scattered", "kept")

SECTOR = 16  # bytes that reach the disk together; small, so that lines are torn


class Crash(BaseException):
    """The machine stops here."""


@dataclass(eq=False)
class Content:
    """A file's bytes: those on the disk, and the writes and cuts since the last sync."""

    durable: bytes
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (size, None) for a cut

    def sync(self) -> None:
        self.durable = self.after("kept", Random(0))
        self.pending.clear()

    def after(self, loss: Loss, random: Random) -> bytes:
        """Return what a restart finds."""
        found = bytearray(self.durable)
        keep = {"lost": 0, "half": (len(self.pending) + 1) // 2}.get(loss, len(self.pending))
        for number, (offset, data) in enumerate(self.pending[:keep]):
            if data is None:
                found[offset:] = bytes(max(0, offset - len(found)))
                continue
            if loss == "half" and number == keep - 1:
                data = data[: len(data) // 2]
            found.extend(bytes(max(0, offset + len(data) - len(found))))
            if loss != "scattered":
                found[offset : offset + len(data)] = data
                continue
            for start in range(0, len(data), SECTOR):
                if random.random() < 0.5:
                    found[offset + start : offset + start + SECTOR] = data[start : start + SECTOR]
        return bytes(found)


class Disk:
    """Which contents the names stand for: now, and after the machine stopped."""

    def __init__(self) -> None:
        self._names: dict[Path, Content | None] = {}  # None: nothing of that name
        self._durable: dict[Path, Content | None] = {}

    def content(self, path: Path) -> Content | None:
        """Return what stands under a name; what was there before is taken for durable."""
        if path not in self._names:
            found = Content(path.read_bytes()) if path.is_file() else None
            self._names[path] = self._durable[path] = found
        return self._names[path]

    def make(self, path: Path) -> Content:
        """Return what stands under a name; an empty file is made when there is nothing."""
        content = self.content(path)
        if content is None:
            content = self._names[path] = Content(b"")
        return content

    def rename(self, source: Path, target: Path) -> None:
        moved = self.content(source)
        self.content(target)
        self._names[target], self._names[source] = moved, None

    def remove(self, path: Path) -> None:
        self.content(path)
        self._names[path] = None

    def sync_folder(self, path: Path) -> None:
        for name, content in self._names.items():
            if name.parent == path:
                self._durable[name] = content

    def after(self, loss: Loss, random: Random) -> dict[Path, bytes | None]:
        """Return what a restart finds under each name."""
        found: dict[Path, bytes | None] = {}
        for path, now in self._names.items():
            kept = {"lost": False, "kept": True}.get(loss, random.random() < 0.5)
            content = now if kept else self._durable[path]
            found[path] = None if content is None else content.after(loss, random)
        return found


class FaultyFiles:
    """Files that stop the machine at operation number `at` (from 0), or refuse it with `error`; -1 never does.

    With `sticky` every later operation is refused as well, as on a disk that stays full.
    """

    def __init__(self, at: int = -1, error: int = 0, sticky: bool = True) -> None:
        self.count = 0
        self._at = at
        self._error = error
        self._sticky = sticky
        self._files = DiskFiles()
        self.disk = Disk()

    def point(self, path: Path) -> None:
        """Count an operation on `path`; this is where faults happen."""
        number, self.count = self.count, self.count + 1
        if self._at < 0 or number < self._at or (number > self._at and not self._sticky):
            return
        if self._error:
            raise OSError(self._error, os.strerror(self._error), str(path))
        raise Crash(f"operation {number} on {path.name}")

    def crash(self, loss: Loss, random: Random) -> None:
        """Leave on the disk what a restart finds there."""
        for path, data in self.disk.after(loss, random).items():
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)

    def open(self, path: Path) -> File:
        self.disk.content(path)
        self.point(path)
        return FaultyFile(self, path, self.disk.make(path), self._files.open(path))

    def size(self, path: Path) -> int:
        return self._files.size(path)

    def replace(self, source: Path, target: Path) -> None:
        self.disk.content(source)
        self.disk.content(target)
        self.point(target)
        self._files.replace(source, target)
        self.disk.rename(source, target)

    def remove(self, path: Path) -> None:
        if self.disk.content(path) is None:
            return
        self.point(path)
        self._files.remove(path)
        self.disk.remove(path)

    def make_folder(self, path: Path) -> None:
        self.point(path)
        self._files.make_folder(path)

    def sync_folder(self, path: Path) -> None:
        self.point(path)
        self.disk.sync_folder(path)


class FaultyFile:
    """An open file of a FaultyFiles."""

    def __init__(self, files: FaultyFiles, path: Path, content: Content, file: File) -> None:
        self._files = files
        self._path = path
        self._content = content
        self._file = file

    def read(self, offset: int, length: int) -> bytes:
        return self._file.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        try:
            self._files.point(self._path)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a full disk takes what it can
                self._do(offset, data[: len(data) // 2])
            raise
        except Crash:
            self._do(offset, data)
            raise
        self._do(offset, data)

    def _do(self, offset: int, data: bytes) -> None:
        self._file.write(offset, data)
        self._content.pending.append((offset, data))

    def truncate(self, size: int) -> None:
        self._files.point(self._path)
        self._file.truncate(size)
        self._content.pending.append((size, None))

    def sync(self) -> None:
        self._files.point(self._path)
        self._content.sync()

    def close(self) -> None:
        self._file.close()
