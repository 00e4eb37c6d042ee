"""Files as a durable job needs them: open, write at a place, sync, rename. It must not know what is written in them.

Everything that must survive a crash goes through the two small protocols below, so that a test can put a layer
in their place that loses, tears or refuses writes. The journal's database is the one exception: SQLite has its own.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from shoal.core.errors import ShoalError, UsageError

MISSING = -1  # the size of a file that does not exist

_USERS_MISTAKES = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS})


class File(Protocol):
    """One open file. Offsets and sizes are bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes; fewer at the end of the file."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`; durable after the next sync."""
        ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. Names are durable after `sync_folder`, contents after `File.sync`."""

    def open(self, path: Path) -> File:
        """Open for reading and writing; made empty when missing."""
        ...

    def size(self, path: Path) -> int:
        """Return the size of what the name stands for now; MISSING when there is nothing."""
        ...

    def replace(self, source: Path, target: Path) -> None:
        """Give the file `source` the name `target`, at once."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file; nothing happens when it is missing."""
        ...

    def make_folder(self, path: Path) -> None: ...

    def sync_folder(self, path: Path) -> None: ...


class DiskFile:
    """A File on the disk."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a full disk shows first as a short write, then as an error
            done = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[done:], offset + done

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DiskFiles:
    """The Files of this machine."""

    def open(self, path: Path) -> File:
        return DiskFile(path)

    def size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return MISSING

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Stream(io.RawIOBase):
    """A File as a writable Python stream from its start, for libraries that want one. Wrap it in a BufferedWriter."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file = file
        self._offset = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        chunk = bytes(data)  # type: ignore[call-overload]
        self._file.write(self._offset, chunk)
        self._offset += len(chunk)
        return len(chunk)

    def tell(self) -> int:
        return self._offset


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals about `path` into errors that say what to do."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        reason = error.strerror or str(error)
        if error.errno in _USERS_MISTAKES:
            raise UsageError(f"cannot use {name}: {reason}; choose another output, or mend its permissions") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShoalError(
                f"no room left for {name}: {reason}; every answer committed so far is kept: "
                "make room and run the same command again to continue"
            ) from error
        raise ShoalError(
            f"the disk refused {name}: {reason}; every answer committed so far is kept: "
            "when the disk is well again, run the same command again to continue"
        ) from error


@contextmanager
def whole(files: Files, path: Path) -> Iterator[File]:
    """Give an empty file that takes the name `path` at the end: after a crash there is the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        files.remove(part)
        file = files.open(part)
        try:
            yield file
            file.sync()
        finally:
            file.close()
        files.replace(part, path)
        files.sync_folder(path.parent)


def write_whole(files: Files, path: Path, data: bytes) -> None:
    """Put `data` into `path`: after a crash there is the old content or the new one, never a mixture."""
    with whole(files, path) as file:
        file.write(0, data)


_NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs ncpfs 9p virtiofs afs coda ceph glusterfs lustre gpfs beegfs ocfs2 gfs2 orangefs".split()
)


def on_network(folder: Path, mounts: str) -> bool:
    """Whether `folder` lies on a file system that other machines share, by the text of /proc/self/mountinfo.

    FUSE counts as network: nothing tells which ones are. An empty text (no such file here) counts as local.
    """
    target = folder.resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        point = Path(fields[4].encode().decode("unicode_escape"))  # spaces in names are written \040
        if len(point.parts) >= best and target.is_relative_to(point):  # of equal points the later mount lies on top
            best, kind = len(point.parts), fields[fields.index("-") + 1]
    return kind in _NETWORK or kind.split(".")[0] == "fuse"


def read_mounts() -> str:
    """Return /proc/self/mountinfo, or nothing where there is none."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
