"""Every row of a file is found where it stands, whatever the chunks are, and other inputs become such a file once."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
import pytest

from shoal.core.errors import StateError, UsageError
from shoal.jobs import read
from shoal.jobs.files import DiskFiles
from shoal.jobs.options import STDIN
from shoal.jobs.read import Source
from shoal.jobs.schema import LINE_LIMIT
from shoal.jobs.spool import open_source

PIECES = (b"\n", b"\r\n", b" ", b"a", b"\r", b"bc", b"\xef\xbb\xbf", b"\x00", b"\t", b"\x85")


def naive(content: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """Places of rows and number of lines, by splitting the whole."""
    offset = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    lines = content[offset:].split(b"\n")
    if not lines[-1]:
        lines.pop()
    places = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            places.append((number, offset, len(line) - line.endswith(b"\r")))
        offset += len(line) + 1
    return places, len(lines)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 4096])
def test_rows_are_found_whatever_the_chunks(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "CHUNK", chunk)
    rng = Random(chunk)
    path = tmp_path / "in.jsonl"
    for _ in range(300):
        content = b"".join(rng.choice(PIECES) for _ in range(rng.randrange(30)))
        path.write_bytes(content)
        places, lines = naive(content)
        with Source(path) as source:
            assert list(source) == places, content
            assert (source.num_lines, source.num_rows, source.size) == (lines, len(places), len(content))
            assert source.fingerprint == hashlib.sha256(content).hexdigest()
            for _, offset, length in places:
                assert source.read(offset, length) == content[offset : offset + length]
        with Source(path) as source:
            assert source.fingerprint == hashlib.sha256(content).hexdigest()  # without an iteration


def test_long_lines_never_enter_memory_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b" " * (1 << 20))
        file.write(b"x\r\n{}\n")
    with Source(path) as source:
        tracemalloc.start()
        places = list(source)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert places == [(1, 0, (64 << 20) + 1), (2, (64 << 20) + 3, 2)]
        assert source.read(0, LINE_LIMIT + 1) is None
    assert peak < 96 << 20  # a few chunks and their masks; not their sum over the line


@pytest.mark.parametrize("head", [b"\xff\xfe{\x00", b"\xfe\xff\x00{", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"])
def test_files_that_are_no_text_are_refused_at_once(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(head)
    with pytest.raises(UsageError, match="first"):
        Source(path)
    with pytest.raises(UsageError, match="cannot read"):
        Source(tmp_path / "none.jsonl")


def rows_of(source: Source) -> list[object]:
    with source:
        return [json.loads(source.read(offset, length) or b"null") for _, offset, length in source]


Opener = Callable[[Path, bytes], Source]


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    state = tmp_path / "state"
    state.mkdir()
    return lambda path, stdin=b"": open_source(path, state, DiskFiles(), io.BytesIO(stdin))


def test_jsonl_is_read_in_place(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a":1}\n')
    assert opened(path, b"").path == path


def test_standard_input_is_spooled_once(opened: Opener) -> None:
    content = b'{"a":1}\n\n{"a":2}'
    assert rows_of(opened(STDIN, content)) == [{"a": 1}, {"a": 2}]
    assert rows_of(opened(STDIN, b"")) == [{"a": 1}, {"a": 2}]  # run again with nothing to read
    assert rows_of(opened(STDIN, content)) == [{"a": 1}, {"a": 2}]  # or with the same again
    with pytest.raises(StateError, match="standard input"):
        opened(STDIN, b'{"a":3}')


def test_csv_rows_are_objects_and_a_bad_record_costs_itself(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,"two\nlines, ""quoted"""\r\n\r\n2\r\n3,x,y\r\n4,Gr\xf6sse\r\n5,\xe6\xb0\xb4\r\n'
    )
    rows = rows_of(opened(path, b""))
    assert rows[0] == {"id": "1", "text": 'two\nlines, "quoted"'}
    assert rows[1:3] == [["2"], ["3", "x", "y"]]
    assert isinstance(rows[3], list)  # not UTF-8
    assert rows[4] == {"id": "5", "text": "水"}
    path.write_bytes(b"id,text\n9,z\n")
    with pytest.raises(StateError, match="in.csv"):
        opened(path, b"")


def test_a_quote_without_end_costs_no_more_than_its_record(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "in.csv"
    with path.open("wb") as file:
        file.write(b'text\na\n"b\n')
        for _ in range(LINE_LIMIT // 1000 + 10):
            file.write(b"x" * 999 + b"\n")
        file.write(b"c\n")
    rows = rows_of(opened(path, b""))
    assert rows[0] == {"text": "a"} and isinstance(rows[1], list) and rows[-1] == {"text": "c"}


@pytest.mark.parametrize("content", [b"", b"a,b,a\n1,2,3\n"])
def test_csv_needs_a_header_of_different_names(content: bytes, tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        opened(path, b"")


def test_parquet_rows_keep_their_types(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "in.parquet"
    rows = [{"text": f"row {i}", "n": i, "x": i / 2, "none": None, "list": [i, None]} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(opened(path, b"")) == rows
    other = tmp_path / "state" / "no.parquet"
    other.write_bytes(b"not parquet")
    (tmp_path / "state" / "input.json").unlink()
    with pytest.raises(UsageError, match="Parquet"):
        opened(other, b"")
