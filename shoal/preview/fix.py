"""The repairs of a file that cannot change what was meant: answers' limits that fit, ids of their own, no blank lines.

It knows how a request line is written; what is wrong with one it takes from the run's own checks, and asks them again
about every line that it changes. All other bytes stay as they are, those between the lines too. A line under a new id
that draws its tokens and has no seed draws others than it would have under the old one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from shoal.core.errors import RowError, UsageError
from shoal.jobs.encode import Encoded, RowEncoder
from shoal.jobs.files import DiskFiles, Stream, whole
from shoal.jobs.read import BOM
from shoal.preview.lint import Lint, Repair
from shoal.preview.look import Looked
from shoal.preview.splice import place, replaced

OVERFLOW, REPEATED = "context_length_exceeded", "duplicate_custom_id"
CHUNK = 1 << 20  # bytes
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def repair(looked: Looked, found: Lint, out: Path) -> Lint:
    """Write the repaired file to `out`, which must not be there; the verdict with what was done."""
    if looked.words.encoder.settings.plain:
        raise UsageError("--fix repairs request lines; rows of columns have nothing that can safely be changed")
    if out.exists():
        raise UsageError(f"{out} exists: choose another file for --fix")
    work = _Repairing(looked, {fault.line: fault.code for fault in found.faults})
    with whole(DiskFiles(), out) as file, io.BufferedWriter(Stream(file), CHUNK) as stream:
        work.write(stream)
    repairs = work.repairs
    if found.blank:
        repairs.append(Repair(0, f"{found.blank:,} blank lines left out"))
    return msgspec.structs.replace(found, fixed=str(out), repairs=tuple(repairs), left=work.left)


class _Repairing:
    """One pass over a file."""

    def __init__(self, looked: Looked, bad: dict[int, str]) -> None:
        self.looked, self.bad = looked, bad
        self.encoder: RowEncoder = looked.words.encoder
        self.repairs: list[Repair] = []
        self.left = 0
        self._taken = set(self._ids())  # by any line
        self._seen: set[str] = set()  # by lines above that can be run
        self._next: dict[str, int] = {}  # by id: all lower numbers are taken

    def write(self, stream: IO[bytes]) -> None:
        """Every line, repaired where it can be."""
        source = self.looked.source
        if source.read(0, len(BOM)) == BOM:
            stream.write(BOM)
        with source.path.open("rb") as file:
            for line, offset, length in source:
                raw = source.read(offset, length)
                if raw is None:
                    self.left += 1
                    _copy(file, offset, length, stream)
                else:
                    stream.write(self._line(line, raw))
                stream.write(_end(source.read(offset + length, 2) or b""))

    def _ids(self) -> Iterator[str]:
        """The custom_id of every line that can be run, or perhaps after a repair."""
        for line, offset, length in self.looked.source:
            if self.bad.get(line, REPEATED) in (REPEATED, OVERFLOW):
                custom_id = self.encoder.parse(self.looked.source.read(offset, length)).custom_id
                if custom_id is not None:
                    yield custom_id

    def _line(self, line: int, raw: bytes) -> bytes:
        code = self.bad.get(line, "")
        done = []
        if code == OVERFLOW:
            clamped = clamp(raw, self.encoder)
            if clamped is not None:
                raw, code = clamped[0], ""
                done.append(clamped[1])
        if code in ("", REPEATED):
            custom_id = self.encoder.parse(raw).custom_id
            if custom_id in self._seen:
                numbered = self._number(raw, custom_id)
                if numbered is None:
                    code = REPEATED
                else:
                    raw, custom_id, code = numbered[0], numbered[1], ""
                    done.append(f"custom_id is now {custom_id!r}")
            if custom_id is not None:
                self._seen.add(custom_id)
        self.left += bool(code)
        if done and not code:
            self.repairs.append(Repair(line, "; ".join(done)))
        return raw

    def _number(self, raw: bytes, custom_id: str) -> tuple[bytes, str] | None:
        """The line under an id that no other has; None for a line that is not itself a request."""
        number = self._next.get(custom_id, 2)
        while f"{custom_id}-{number}" in self._taken:
            number += 1
        self._next[custom_id], name = number, f"{custom_id}-{number}"
        if "x_shoal" in _fields.decode(raw):
            return None
        changed = replaced(raw.decode(), "custom_id", msgspec.json.encode(name).decode()).encode()
        if not isinstance(self.encoder.encode([changed])[0], Encoded):
            return None
        self._taken.add(name)
        return changed, name


def clamp(raw: bytes, encoder: RowEncoder) -> tuple[bytes, str] | None:
    """The line with the largest max_tokens that fits, and what was done; None where the prompt itself does not fit."""
    envelope = _fields.decode(raw)
    if "x_shoal" in envelope:
        return None
    body = _fields.decode(envelope["body"])
    was = encoder.parse(raw).max_tokens
    given = [each for each in ("max_completion_tokens", "max_tokens") if bytes(body.get(each, b"null")) != b"null"]
    name = given[0] if given else "max_tokens"
    text = raw.decode()
    start = place(text, "body")

    def limited(limit: int) -> tuple[bytes, Encoded | RowError]:
        changed = replaced(text, name, str(limit), start).encode()
        return changed, encoder.encode([changed])[0]

    _, shortest = limited(max(encoder.parse(raw).body.min_tokens or 0, 1))
    if was is None or not isinstance(shortest, Encoded):
        return None
    room = encoder.model.context - max(map(len, shortest.prompts))
    changed, found = limited(room)
    return (changed, f"{name} {was} is now {room}") if isinstance(found, Encoded) else None


def _end(after: bytes) -> bytes:
    """What ends a line, of the two bytes behind it: nothing where the file ends."""
    return after if after == b"\r\n" else after[:1]


def _copy(file: BinaryIO, offset: int, length: int, stream: IO[bytes]) -> None:
    """A line that is too long to be held."""
    file.seek(offset)
    while length and (chunk := file.read(min(length, CHUNK))):
        stream.write(chunk)
        length -= len(chunk)
