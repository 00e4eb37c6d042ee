"""The arena: every prompt of a job as int32 tokens in one file, read through a memory map.

It knows offsets and lengths in tokens; it must not know rows, order or what a token means.
File: the tokens, PAD sentinel tokens, then a footer with the number of tokens and two checksums. A file without
a good footer was torn while it was written and is refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from shoal.core.errors import StateError
from shoal.core.types import TOKEN

PAD = 4096  # sentinels after the last token: a window of this many tokens may be read at any token's offset
SENTINEL = -1
ITEM = 4  # bytes of a token

_MAGIC = b"shoalar1"
_BODY = struct.Struct("<8sqI")  # magic, tokens, crc32 of the tokens and the padding
_CHECK = struct.Struct("<I")  # crc32 of the above
_FOOTER = _BODY.size + _CHECK.size
_CHUNK = 1 << 22  # bytes per read when the checksum is verified


class ArenaWriter:
    """Appends prompts to a new arena file; `close` makes it valid. Left by an exception, the file stays torn."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)
        self._crc = 0
        self.tokens = 0

    def append(self, prompt: array[int]) -> int:
        """Append one prompt; returns its offset in tokens."""
        offset = self.tokens
        self._write(prompt.tobytes())
        self.tokens += len(prompt)
        return offset

    def close(self) -> None:
        """Write padding and footer."""
        self._write(array(TOKEN, [SENTINEL]).tobytes() * PAD)
        body = _BODY.pack(_MAGIC, self.tokens, self._crc)
        self._file.write(body + _CHECK.pack(zlib.crc32(body)))
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)

    def __enter__(self) -> ArenaWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class Arena:
    """A finished arena file. `padded` is int32[tokens + PAD], memory-mapped and read-only."""

    def __init__(self, path: Path, verify: bool = False) -> None:
        """Open and check the footer, with `verify` the content too. Raises StateError when the file is torn."""
        self.path = path
        self.tokens, crc = _read_footer(path)
        if verify and _content_crc(path, (self.tokens + PAD) * ITEM) != crc:
            raise StateError(f"{path} is damaged: its checksum differs. Remove it; it is made again from the input.")
        self.padded: npt.NDArray[np.int32] = np.memmap(path, dtype="<i4", mode="r", shape=(self.tokens + PAD,))

    def slice(self, offset: int, length: int) -> array[int]:
        """A copy of `length` tokens from `offset` (in tokens)."""
        if offset < 0 or length < 0 or offset + length > self.tokens:
            raise IndexError(f"tokens {offset}:{offset + length} of an arena of {self.tokens}")
        prompt = array(TOKEN)
        prompt.frombytes(self.padded[offset : offset + length].tobytes())
        return prompt


def _read_footer(path: Path) -> tuple[int, int]:
    """(tokens, crc32 of the content) of an arena whose footer and size agree."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER))
            footer = file.read(_FOOTER)
    except FileNotFoundError as error:
        raise StateError(f"{path} is missing. Run again: it is made from the input.") from error
    body, check = footer[: _BODY.size], footer[_BODY.size :]
    if len(footer) == _FOOTER and check == _CHECK.pack(zlib.crc32(body)):
        magic, tokens, crc = _BODY.unpack(body)
        if magic == _MAGIC and size == (tokens + PAD) * ITEM + _FOOTER:
            return tokens, crc
    raise StateError(f"{path} is torn: it was not written to its end. Remove it; it is made again from the input.")


def _content_crc(path: Path, size: int) -> int:
    """crc32 of the first `size` bytes, read through a small buffer."""
    crc = 0
    with open(path, "rb") as file:
        while size:
            data = file.read(min(size, _CHUNK))
            if not data:
                break
            crc = zlib.crc32(data, crc)
            size -= len(data)
    return crc
