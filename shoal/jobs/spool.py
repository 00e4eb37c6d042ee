"""Inputs that are not JSONL files as JSONL files in the state folder: standard input, CSV, Parquet.

It must not know what a row says. A spool is made whole or not at all, and is the input of every later run.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec

from shoal.core.errors import StateError, UsageError
from shoal.jobs.files import Files, Stream, whole, write_whole
from shoal.jobs.options import STDIN
from shoal.jobs.read import Source
from shoal.jobs.schema import LINE_LIMIT

SPOOL = "input.jsonl"
RECORD = "input.json"
CHUNK = 1 << 20  # bytes
GROUP = 1024  # Parquet rows in memory at a time


class _Record(msgspec.Struct, frozen=True):
    digest: str  # SHA-256 of what was spooled, before conversion
    rows: str  # kind of the original: stdin, csv, parquet


def open_source(path: Path, folder: Path, files: Files, stdin: BinaryIO) -> Source:
    """The rows of an input. CSV (`.csv`, `.tsv`), Parquet and standard input (`-`) are spooled into `folder` first.

    A spool made by an earlier run is used again: StateError when the original is another one now. Standard input
    that is empty or a terminal then stands for what was spooled.
    """
    spool, record = folder / SPOOL, folder / RECORD
    kind = "stdin" if path == STDIN else {".tsv": "csv", ".pq": "parquet"}.get(path.suffix, path.suffix[1:])
    if kind not in ("stdin", "csv", "parquet"):
        return Source(path)
    if record.exists():
        _compare(path, msgspec.json.decode(record.read_bytes(), type=_Record), stdin)
        return Source(spool)
    with whole(files, spool) as file, io.BufferedWriter(Stream(file), CHUNK) as stream:
        if kind == "stdin":
            digest = _copy(stdin, stream)
        else:
            digest = _digest(path)
            _write_rows(stream, _csv_rows(path) if kind == "csv" else _parquet_rows(path))
    write_whole(files, record, msgspec.json.encode(_Record(digest, kind)))
    return Source(spool)


def _compare(path: Path, record: _Record, stdin: BinaryIO) -> None:
    if path == STDIN:
        if stdin.isatty():
            return
        empty = hashlib.sha256().hexdigest()
        same = _copy(stdin, None) in (record.digest, empty)
        name = "standard input"
    else:
        same = _digest(path) == record.digest
        name = str(path)
    if not same:
        raise StateError(
            f"{name} is not what this job began with: give --restart to begin again, or another output to keep both"
        )


def _copy(source: BinaryIO, target: IO[bytes] | None) -> str:
    """Copy to the end, or only read; the content's SHA-256."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _copy(file, None)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _write_rows(stream: IO[bytes], rows: Iterable[dict[str, Any] | list[str]]) -> None:
    """One line a row. A list is a row that could not be read: its line is refused later, and no other."""
    encoder = msgspec.json.Encoder()
    for row in rows:
        try:
            line = encoder.encode(row)
        except UnicodeEncodeError:  # bytes that are not UTF-8
            fields = list(row.values()) if isinstance(row, dict) else row
            line = encoder.encode([str(field).encode("utf-8", "replace").decode() for field in fields])
        stream.write(line + b"\n")


def _csv_rows(path: Path) -> Iterator[dict[str, Any] | list[str]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _long_fields():
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, None)
        if not header:
            raise UsageError(f"{path} is empty: its first line must name the columns")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UsageError(f"{path} has more than one column named {twice[0]!r}: rename one")
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:  # a quote that is never closed, for one
                yield [str(error)]
                continue
            if fields is None:
                return
            if fields:
                yield dict(zip(header, fields, strict=True)) if len(fields) == len(header) else fields


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a CSV field be as long as a line may be; the library keeps this limit for the whole process."""
    before = csv.field_size_limit(LINE_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any] | list[str]]:
    import pyarrow  # takes a while to import, and few jobs need it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from None
    with table:
        for group in table.iter_batches(GROUP):
            yield from group.to_pylist()
