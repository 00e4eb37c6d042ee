"""The repairs of a file that cannot change what was meant: answers' limits that fit, ids of their own, no blank lines.

It knows how a request line is written; what is wrong with one it takes from the run's own checks, and asks them again
about every line that it changes. All other bytes of a line stay as they are.
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
from shoal.preview.lint import Lint, Repair
from shoal.preview.look import Looked

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

    def write(self, stream: IO[bytes]) -> None:
        """Every line, repaired where it can be."""
        with self.looked.source.path.open("rb") as file:
            for line, offset, length in self.looked.source:
                raw = self.looked.source.read(offset, length)
                if raw is None:
                    self.left += 1
                    _copy(file, offset, length, stream)
                else:
                    stream.write(self._line(line, raw))
                stream.write(b"\n")

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
        number = 2
        while f"{custom_id}-{number}" in self._taken:
            number += 1
        name = f"{custom_id}-{number}"
        envelope = _fields.decode(raw)
        if "x_shoal" in envelope:
            return None
        changed = msgspec.json.encode({**envelope, "custom_id": name})
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

    def limited(limit: int) -> tuple[bytes, Encoded | RowError]:
        changed = msgspec.json.encode({**envelope, "body": {**body, name: limit}})
        return changed, encoder.encode([changed])[0]

    _, shortest = limited(max(encoder.parse(raw).body.min_tokens or 0, 1))
    if was is None or not isinstance(shortest, Encoded):
        return None
    room = encoder.model.context - max(map(len, shortest.prompts))
    changed, found = limited(room)
    return (changed, f"{name} {was} is now {room}") if isinstance(found, Encoded) else None


def _copy(file: BinaryIO, offset: int, length: int, stream: IO[bytes]) -> None:
    """A line that is too long to be held."""
    file.seek(offset)
    while length and (chunk := file.read(min(length, CHUNK))):
        stream.write(chunk)
        length -= len(chunk)
