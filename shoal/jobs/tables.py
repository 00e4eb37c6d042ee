"""Answers as a table: JSON rows to CSV or Parquet, in one go. It must not know jobs or what a column means."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from shoal.core.errors import UsageError
from shoal.jobs.files import Files, Stream, whole

Form = Literal["jsonl", "csv", "parquet"]
Rows = Callable[[], Iterable[bytes]]  # each call gives the rows anew: JSON objects

_GROUP = 8192  # rows in memory at a time
_BUFFER = 1 << 20


def form_of(path: Path) -> Form:
    """Return the form that a file's name asks for; any other ending is JSONL."""
    match path.suffix.lower():
        case ".csv":
            return "csv"
        case ".parquet" | ".pq":
            return "parquet"
        case ".tsv" | ".xlsx" | ".arrow" | ".feather":
            raise UsageError(f"{path}: {path.suffix} is not written; name it .jsonl, .csv or .parquet")
        case _:
            return "jsonl"


def write_table(form: Form, files: Files, path: Path, rows: Rows) -> None:
    """Write the rows to `path`, whole or not at all. Columns stand in the order in which rows first name them."""
    columns: dict[str, str] = {}
    for raw in rows():
        for name, value in json.loads(raw).items():
            columns[name] = _joined(columns.get(name, ""), _kind(value))
    with whole(files, path) as file, io.BufferedWriter(Stream(file), _BUFFER) as stream:
        (_write_csv if form == "csv" else _write_parquet)(stream, columns, rows())


def _write_csv(stream: IO[bytes], columns: dict[str, str], rows: Iterable[bytes]) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", errors="surrogatepass")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for raw in rows:
        row = json.loads(raw)
        writer.writerow("" if row.get(name) is None else _text(row[name]) for name in columns)
    text.detach()  # flushes; the stream is closed by its owner


def _write_parquet(stream: IO[bytes], columns: dict[str, str], rows: Iterable[bytes]) -> None:
    import pyarrow  # takes a while to import, and few jobs need it
    import pyarrow.parquet

    types = {"boolean": pyarrow.bool_(), "integer": pyarrow.int64(), "number": pyarrow.float64()}
    schema = pyarrow.schema([(name, types.get(kind, pyarrow.string())) for name, kind in columns.items()])
    with pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for group in _groups(json.loads(raw) for raw in rows):
            arrays = []
            for name, kind in columns.items():
                values = [row.get(name) for row in group]
                if kind not in types:
                    values = [None if value is None else _text(value) for value in values]
                arrays.append(pyarrow.array(values, schema.field(name).type))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _groups(rows: Iterator[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    while group := list(islice(rows, _GROUP)):
        yield group


def _kind(value: object) -> str:
    """Return the column type a value asks for; nothing for null."""
    match value:
        case None:
            return ""
        case bool():
            return "boolean"
        case int():
            return "integer" if -(2**63) <= value < 2**63 else "text"
        case float():
            return "number"
        case _:
            return "text"


def _joined(first: str, second: str) -> str:
    """Return the type of a column that holds both."""
    if not first or not second or first == second:
        return first or second
    return "number" if {first, second} == {"integer", "number"} else "text"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
