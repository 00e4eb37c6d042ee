"""Where the rows of an input file stand. It must not know what a row says.

A line is read by its place, never kept; a line over the limit is found, counted and refused without being in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from shoal.core.errors import UsageError
from shoal.jobs.schema import LINE_LIMIT

CHUNK = 4 << 20  # bytes read at once
BOM = b"\xef\xbb\xbf"
SPACE = np.zeros(256, dtype=bool)
SPACE[list(b" \t\r\v\f")] = True

Place = tuple[int, int, int]  # line number from 1, byte offset, byte length without the line's end


class _Lines:
    """Finds lines in chunks of a file. Remembers no text: of the line that a chunk cut only where it began."""

    def __init__(self, start: int) -> None:
        self.number = 0  # lines that have ended
        self.offset = start  # of the next chunk
        self.line_start = start
        self.blank = True  # whether the cut line has nothing but space so far
        self.last = 0  # the byte before the next chunk

    def take(self, chunk: bytes) -> Iterable[Place]:
        """The places of the rows that end in this chunk."""
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == 0x0A)
        starts = np.concatenate(([0], ends + 1))  # within the chunk; the last is that of the line it cuts
        before = np.concatenate(([self.last], data))[ends]  # the byte before each line's end
        offsets = starts + self.offset
        offsets[0] = self.line_start
        lengths = ends + self.offset - offsets[:-1] - (before == 0x0D)
        blank = SPACE[data[np.minimum(starts[:-1], len(data) - 1)]] | (starts[:-1] == ends)
        for i in np.flatnonzero(blank).tolist():
            blank[i] = not chunk[starts[i] : ends[i]].strip()
        if len(ends):
            blank[0] &= self.blank
        rest = chunk[starts[-1] :]
        self.blank = not rest.strip() and (len(ends) > 0 or self.blank)
        self.last = chunk[-1]
        self.line_start = int(offsets[-1])
        self.offset += len(chunk)
        rows = np.flatnonzero(~blank)
        numbers = rows + self.number + 1
        self.number += len(ends)
        return zip(numbers.tolist(), offsets[rows].tolist(), lengths[rows].tolist(), strict=True)

    def end(self) -> Iterable[Place]:
        """The last line, where the file does not end with a line's end."""
        return self.take(b"\n") if self.line_start < self.offset else ()


class Source:
    """The rows of a JSONL file. Iterating gives their places; `read` gives a row's bytes, from any thread.

    Blank lines have a number and are not rows. A byte order mark, CRLF and a missing last line end are tolerated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0  # of the last whole iteration, blank ones included
        self.num_rows = 0
        self._fingerprint = ""
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        head = os.pread(self._file, 4, 0)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            self.close()
            raise UsageError(f"{path} is UTF-16: convert it first (iconv -f UTF-16 -t UTF-8 {path} > new.jsonl)")
        if head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd":
            self.close()
            raise UsageError(f"{path} is compressed: unpack it first")
        self._start = len(BOM) if head.startswith(BOM) else 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole file; free after an iteration to the end."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for chunk in self._chunks(0):
                digest.update(chunk)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def read(self, offset: int, length: int) -> bytes | None:
        """The row's bytes; None for a row longer than LINE_LIMIT."""
        return None if length > LINE_LIMIT else os.pread(self._file, length, offset)

    def __iter__(self) -> Iterator[Place]:
        digest = hashlib.sha256(os.pread(self._file, self._start, 0))
        lines = _Lines(self._start)
        rows = 0
        for chunk in self._chunks(self._start):
            digest.update(chunk)
            for place in lines.take(chunk):
                rows += 1
                yield place
        for place in lines.end():
            rows += 1
            yield place
        self.num_lines, self.num_rows = lines.number, rows
        self._fingerprint = digest.hexdigest()

    def _chunks(self, start: int) -> Iterator[bytes]:
        while chunk := os.pread(self._file, CHUNK, start):
            yield chunk
            start += len(chunk)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
