"""The files say what the journal says, in order, whoever finished first and whatever was left by the last run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pyarrow.parquet
import pytest
from durable_job import Job, memory_folder, payload, status
from faulty import LOSSES, Crash, FaultyFiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.clock import SimClock
from shoal.core.errors import ShoalError, StateError, UsageError
from shoal.jobs.files import DiskFiles
from shoal.jobs.results import Results, open_results
from shoal.jobs.tables import Form, form_of, write_table
from shoal.jobs.write import CHECKPOINT_BYTES, Order

FILES = DiskFiles()
KEY = b"k" * 16


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def opened(
    folder: Path, lines: Sequence[int], order: Order = "input", errors: str | None = "e.jsonl", form: Form = "jsonl"
) -> Results:
    out = folder / f"o.{form}"
    return open_results(folder, out, None if errors is None else folder / errors, lines, order, FILES, SimClock(), form)


def put(results: Results, *lines: int) -> None:
    for line in lines:
        results.put(line, KEY, status(line), payload(line), {"prompt_tokens": line})


def text(lines: Sequence[int], ok: bool = True) -> bytes:
    return b"".join(payload(line) + b"\n" for line in lines if (status(line) == "ok") is ok)


def test_lines_wait_for_the_one_before(folder: Path) -> None:
    with opened(folder, range(1, 9)) as results:
        put(results, 2, 8, 4)
        results.tick(1.0)
        assert str(results.status()) == "answered 3, written 0, waiting for line 1"
        assert (folder / "o.jsonl").read_bytes() == b"" and not (folder / "e.jsonl").exists()
        put(results, 1)
        assert str(results.status()) == "answered 4, written 0, waiting for line 1"
        results.tick(2.0)
        assert str(results.status()) == "answered 4, written 2, waiting for line 3"
        assert (folder / "o.jsonl").read_bytes() == text([1, 2])
        put(results, 3, 7, 6, 5)
        assert str(results.finish()) == "answered 8, written 8"
    assert (folder / "o.jsonl").read_bytes() == text(range(1, 9))
    assert (folder / "e.jsonl").read_bytes() == text(range(1, 9), ok=False)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 9))
    assert rows[2] == {"line": 3, "status": "failed", "prompt_tokens": 3}


def test_nothing_is_written_before_it_is_committed(folder: Path) -> None:
    with opened(folder, range(1, 9)) as results:
        put(results, 1, 2)
        assert results.journal.committed == 0 and results.status().written == 0
        results.tick(0.4)
        assert results.status().written == 0
        results.tick(0.5)
        assert results.journal.committed == 2 and results.status().written == 2


def test_a_job_that_is_closed_goes_on_where_it_was(folder: Path) -> None:
    lines = [line for line in range(1, 30) if line % 7]
    order = sorted(lines, key=lambda line: Random(line).random())
    for start in range(0, len(lines), 5):
        with opened(folder, lines) as results:
            assert [results.done(line) for line in order] == [number < start for number in range(len(order))]
            put(results, *order[start : start + 5])
    with opened(folder, lines) as results:
        results.finish()
    assert (folder / "o.jsonl").read_bytes() == text(lines)


def test_a_job_cannot_be_finished_early(folder: Path) -> None:
    with opened(folder, range(1, 4)) as results:
        put(results, 1, 3)
        with pytest.raises(ShoalError, match="cannot be finished: answered 2, written 1, waiting for line 2"):
            results.finish()


def test_an_empty_job_leaves_an_empty_output(folder: Path) -> None:
    with opened(folder, ()) as results:
        assert str(results.finish()) == "answered 0, written 0"
    assert (folder / "o.jsonl").read_bytes() == b"" and not (folder / "e.jsonl").exists()


def test_one_file_takes_every_line_when_there_is_no_other(folder: Path) -> None:
    with opened(folder, range(1, 9), errors=None) as results:
        put(results, *range(8, 0, -1))
        results.finish()
    assert (folder / "o.jsonl").read_bytes() == b"".join(payload(line) + b"\n" for line in range(1, 9))


def test_finish_order_writes_at_once_and_is_kept(folder: Path) -> None:
    with opened(folder, range(1, 9), order="finish") as results:
        put(results, 5, 1)
        results.tick(1.0)
        assert (folder / "o.jsonl").read_bytes() == text([5, 1])
        assert str(results.status()) == "answered 2, written 2"
    with pytest.raises(StateError, match="begun with --order finish, not input.*--restart"):
        opened(folder, range(1, 9))
    with opened(folder, range(1, 9), order="finish") as results:
        put(results, 8, 7, 6, 4, 3, 2)
        results.finish()
    assert (folder / "o.jsonl").read_bytes() == text([5, 1, 8, 6, 4, 2])


@pytest.mark.parametrize("order", ["input", "finish"])
@pytest.mark.parametrize("name", ["o.jsonl", "e.jsonl"])
def test_a_file_that_was_edited_is_refused_with_the_place(folder: Path, name: str, order: Order) -> None:
    with opened(folder, range(1, 30), order) as results:
        put(results, *range(1, 20))
    path = folder / name
    good = path.read_bytes()
    for found, place in (
        (good[:30] + b"!" + good[31:], 30),
        (good[:30] + b"\0" + good[31:], 30),
        (good + b"mine\n", len(good)),
        (good[:-3], len(good) - 3),
        (b"", 0),
        (b"another file, which is longer than ours was\n" * 99, 0),
    ):
        path.write_bytes(found)
        with pytest.raises(StateError, match=rf"{name} was edited or replaced: at byte {place} .*--restart") as raised:
            opened(folder, range(1, 30), order)
        assert raised.value.exit_code == 2
        assert path.read_bytes() == found
    path.unlink()
    with pytest.raises(StateError, match="at byte 0 it is missing"):
        opened(folder, range(1, 30), order)
    path.write_bytes(good)
    with opened(folder, range(1, 30), order) as results:
        put(results, *range(20, 30))
        results.finish()
    assert (folder / "o.jsonl").read_bytes() == text(range(1, 30))


def test_a_torn_tail_is_mended_and_anything_else_is_not(folder: Path) -> None:
    results = opened(folder, range(1, 30))
    put(results, 1, 2)
    results.tick(6.0)  # a checkpoint
    put(results, *range(3, 20))
    results.tick(7.0)
    results.journal.close()
    path, safe = folder / "o.jsonl", len(text([1, 2]))
    whole = path.read_bytes()
    assert len(whole) > safe + 100
    for found in (whole[:-7], whole[:safe], whole[: safe + 40] + bytes(50) + whole[safe + 90 :], whole):
        path.write_bytes(found)
        opened(folder, range(1, 30)).journal.close()
        assert path.read_bytes() == whole
    for found, place in ((whole[: safe + 9] + b"?" + whole[safe + 10 :], safe + 9), (whole + b"\0", len(whole))):
        path.write_bytes(found)
        with pytest.raises(StateError, match=f"at byte {place} "):
            opened(folder, range(1, 30))


def test_another_hand_is_noticed_while_the_job_runs(folder: Path) -> None:
    for damage in ("append", "remove"):
        root = folder / damage
        root.mkdir()
        results = opened(root, range(1, 30))
        put(results, 1, 2)
        results.tick(1.0)
        if damage == "append":
            with (root / "o.jsonl").open("ab") as file:
                file.write(b"mine\n")
        else:
            (root / "o.jsonl").unlink()
        with pytest.raises(StateError, match="changed while the job was writing it"):
            results.tick(20.0)
        with pytest.raises(ShoalError, match="had an error before"):
            put(results, 3)
        results.close()


def test_checkpoints_come_by_time_and_by_size(folder: Path) -> None:
    with opened(folder, range(1, 9)) as results:
        put(results, 1)
        results.tick(1.0)
        results.tick(5.9)
        assert results.journal.written().rows == 0
        results.tick(6.0)
        assert results.journal.written().rows == 1
        results.put(2, KEY, "ok", b"x" * CHECKPOINT_BYTES, {})
        results.tick(6.5)
        assert results.journal.written().rows == 2
        results.tick(60.0)


def test_a_death_does_not_count_for_rows_that_have_ended(folder: Path) -> None:
    with opened(folder, range(1, 9)) as results:
        put(results, 1)
        assert results.died([1, 2]) == []
        assert results.died([1, 2, 3]) == [2]


ROWS = [
    {"name": "a,b", "n": 1, "x": 1, "flag": True, "list": [1, "é"], "answer": 'say "hi"\nbye'},
    {"name": None, "n": 2, "x": 2.5, "flag": None, "list": None, "answer": "", "late": "z"},
    {"name": "ü", "n": 2**70, "x": None, "flag": False, "list": {}, "answer": "\ud800 x"},
]


def test_tables_hold_what_the_rows_say(folder: Path) -> None:
    raws = [json.dumps(row).encode() for row in ROWS]
    write_table("csv", FILES, folder / "t.csv", lambda: raws)
    with (folder / "t.csv").open(newline="", encoding="utf-8", errors="surrogatepass") as file:
        found = list(csv.reader(file))
    assert found[0] == ["name", "n", "x", "flag", "list", "answer", "late"]
    assert found[1] == ["a,b", "1", "1", "true", '[1, "é"]', 'say "hi"\nbye', ""]
    assert found[2] == ["", "2", "2.5", "", "", "", "z"]
    raws[2] = json.dumps(ROWS[2] | {"answer": "x"}).encode()
    write_table("parquet", FILES, folder / "t.parquet", lambda: raws)
    table = pyarrow.parquet.read_table(folder / "t.parquet")
    assert table.column("n").to_pylist() == ["1", "2", str(2**70)]
    assert table.column("x").to_pylist() == [1.0, 2.5, None]
    assert table.column("flag").to_pylist() == [True, None, False]
    assert table.column("list").to_pylist() == ['[1, "é"]', None, "{}"]
    assert table.column("late").to_pylist() == [None, "z", None]
    assert sorted(path.name for path in folder.iterdir()) == ["t.csv", "t.parquet"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_appears_at_the_end(folder: Path, form: Form) -> None:
    with opened(folder, range(1, 9), form=form) as results:
        put(results, *range(8, 0, -1))
        results.tick(9.0)
        assert not (folder / f"o.{form}").exists()
        assert (folder / "e.jsonl").read_bytes() == text(range(1, 9), ok=False)
        results.finish()
    if form == "csv":
        found = list(csv.DictReader((folder / "o.csv").open(newline="", encoding="utf-8")))
    else:
        found = pyarrow.parquet.read_table(folder / "o.parquet").to_pylist()
    assert [int(row["line"]) for row in found] == [line for line in range(1, 9) if status(line) == "ok"]


def test_the_name_decides_the_form() -> None:
    names = {"a.jsonl": "jsonl", "a": "jsonl", "a.CSV": "csv", "a.parquet": "parquet", "a.pq": "parquet"}
    assert {name: form_of(Path(name)) for name in names} == names
    with pytest.raises(UsageError, match="name it .jsonl, .csv or .parquet"):
        form_of(Path("a.xlsx"))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    lines=st.sets(st.integers(1, 60), max_size=30).map(sorted),
    seconds=st.sampled_from([0.0, 0.2, 0.6, 3.0]),
    order=st.sampled_from(["input", "finish"]),
)
def test_any_order_any_crashes_the_same_bytes(
    data: st.DataObject, lines: list[int], seconds: float, order: Order
) -> None:
    """Each life of the job ends at a random operation, finishes rows in its own order, and loses what it likes."""
    with memory_folder() as folder:
        job = Job(folder, lines, lines, order=order, seconds=seconds)
        for _ in range(data.draw(st.integers(0, 5))):
            job.finish = data.draw(st.permutations(lines))
            files = FaultyFiles(data.draw(st.integers(0, 60)))
            try:
                job.run(files)
            except Crash:
                files.crash(data.draw(st.sampled_from(LOSSES)), data.draw(st.randoms()))
        job.finish = data.draw(st.permutations(lines))
        job.run(FILES)
        final = job.final()
    for name, ok in (("answers.jsonl", True), ("answers.errors.jsonl", False)):
        found, wanted = final.get(name, b""), text(lines, ok)
        assert found == wanted if order == "input" else sorted(found.split(b"\n")) == sorted(wanted.split(b"\n"))
