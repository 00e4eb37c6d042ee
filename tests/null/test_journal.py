"""The journal keeps what it promised, refuses what contradicts it, and says what to do when it cannot."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shoal.core.errors import ShoalError, StateError
from shoal.jobs import look
from shoal.jobs.files import on_network
from shoal.jobs.journal import COMMIT_ROWS, COMMIT_SECONDS, Journal, Row, Written
from shoal.jobs.state import folder_of

KEY = b"k" * 16
NETWORK = "1 0 0:1 / / rw - nfs4 server:/home rw"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path)) as found:
        yield found


def fill(journal: Journal, lines: list[int], size: int = 10) -> None:
    for line in lines:
        journal.put(line, KEY, "ok", b"%d " % line + b"x" * size, {"prompt_tokens": 3}, 0.0)
    journal.commit()


def test_committed_rows_are_there_again_and_others_are_not(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        journal.put(7, KEY, "ok", b"seven", {}, 0.0)
        journal.put(2, KEY, "failed", b"two", {}, 0.0)
        assert journal.committed == 0
        journal.commit()
        journal.put(3, KEY, "ok", b"three", {}, 0.0)
        assert journal.done(3) and journal.committed == 2
    with closing(Journal(tmp_path)) as journal:
        assert [journal.done(line) for line in (1, 2, 3, 7, 8, 10**9)] == [False, True, False, True, False, False]
        assert journal.counts == {"ok": 1, "failed": 1}
        assert list(journal.by_line(1, 9)) == [Row(2, "failed", b"two"), Row(7, "ok", b"seven")]
        assert list(journal.by_turn(0, 9)) == [Row(7, "ok", b"seven"), Row(2, "failed", b"two")]


@pytest.mark.parametrize("committed", [True, False])
def test_the_same_result_again_changes_nothing_and_another_is_an_error(journal: Journal, committed: bool) -> None:
    assert journal.put(1, KEY, "ok", b"one", {"seconds": 1.0}, 0.0)
    if committed:
        journal.commit()
    assert not journal.put(1, KEY, "ok", b"one", {"seconds": 2.0}, 0.0)
    for key, status, payload in ((KEY, "ok", b"uno"), (KEY, "failed", b"one"), (b"other", "ok", b"one")):
        with pytest.raises(ShoalError, match="line 1 was answered before"):
            journal.put(1, key, status, payload, {}, 0.0)  # type: ignore[arg-type]
    journal.commit()
    assert list(journal.by_line(1, 1)) == [Row(1, "ok", b"one")]
    assert journal.counts == {"ok": 1}


def test_a_group_is_committed_after_half_a_second_or_256_rows(journal: Journal) -> None:
    assert not journal.due(100.0)
    journal.put(1, KEY, "ok", b"", {}, 100.0)
    assert not journal.due(100.0 + COMMIT_SECONDS - 0.01) and journal.due(100.0 + COMMIT_SECONDS)
    for line in range(2, COMMIT_ROWS + 1):
        assert not journal.due(100.0)
        journal.put(line, KEY, "ok", b"", {}, 100.0)
    assert journal.due(100.0)
    journal.commit()
    assert not journal.due(200.0)


def test_a_result_is_one_line(journal: Journal) -> None:
    with pytest.raises(ValueError, match="not one line"):
        journal.put(1, KEY, "ok", b"a\nb", {}, 0.0)


def test_a_row_is_tried_again_after_one_death_and_not_after_two(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        assert journal.died([4, 5]) == []
    with closing(Journal(tmp_path)) as journal:
        assert journal.died([5, 6]) == [5]


def test_statistics_and_notes_come_back(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        journal.put(2, KEY, "ok", b"", {"prompt_tokens": 5, "cached": 2}, 0.0)
        journal.put(1, KEY, "failed", b"", {"prompt_tokens": 7}, 0.0)
        journal.commit(Written(1, 20, 30))
        journal.set_meta("order", "input")
    with closing(Journal(tmp_path)) as journal:
        assert list(journal.stats()) == [
            (1, "failed", '{"prompt_tokens":7}'),
            (2, "ok", '{"prompt_tokens":5,"cached":2}'),
        ]
        assert journal.written() == Written(1, 20, 30)
        assert (journal.meta("order"), journal.meta("x")) == ("input", None)


def test_rows_are_read_a_few_at_a_time(journal: Journal) -> None:
    fill(journal, list(range(1, 5001)), size=2000)
    tracemalloc.start()
    assert sum(len(row.payload) > 2000 for row in journal.by_line(1, 5000)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_has_ended_takes_a_bit_a_line(journal: Journal) -> None:
    tracemalloc.start()
    journal.put(5_000_000, KEY, "ok", b"", {}, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert journal.done(5_000_000) and not journal.done(4_999_999)
    assert peak < 2_000_000


@pytest.mark.parametrize("start", [0, 100, 4096, -20_000, -1000])
def test_a_damaged_journal_says_what_to_do(tmp_path: Path, start: int) -> None:
    with closing(Journal(tmp_path)) as journal:
        fill(journal, list(range(1, 500)), size=100)
        path = journal.path
    raw = path.read_bytes()
    at = start % len(raw)
    path.write_bytes(raw[:at] + b"\xa5" * (len(raw) - at))
    with pytest.raises(StateError, match="damaged.*--restart|another version"):
        with closing(Journal(tmp_path)) as journal:
            list(journal.by_line(1, 500))


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        path = journal.path
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(StateError, match="another version of shoal"):
        Journal(tmp_path)


def test_a_full_disk_loses_only_what_was_not_committed(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        fill(journal, [1, 2])
        journal._database.execute("PRAGMA max_page_count=8")  # the full disk that SQLite itself offers
        journal.put(3, KEY, "ok", b"x" * 100_000, {}, 0.0)
        with pytest.raises(ShoalError, match="full.*run the same command again") as raised:
            journal.commit()
        assert raised.value.exit_code == 1
    with closing(Journal(tmp_path)) as journal:
        assert [journal.done(line) for line in (1, 2, 3)] == [True, True, False]


def test_others_read_while_the_job_writes(journal: Journal) -> None:
    with closing(sqlite3.connect(journal.path)) as reader:
        for line in range(1, 20):
            fill(journal, [line])
            assert reader.execute("SELECT count(*) FROM results").fetchone() == (line,)


def test_network_file_systems_get_a_rollback_journal(tmp_path: Path) -> None:
    for mounts, mode in ((NETWORK, "delete"), ("", "wal")):
        folder = tmp_path / mode
        folder.mkdir()
        with closing(Journal(folder, mounts)) as journal:
            fill(journal, [1])
            assert journal.network is (mode == "delete")
            assert journal._database.execute("PRAGMA journal_mode").fetchone() == (mode,)


@pytest.mark.parametrize("mounts", [NETWORK, ""])
def test_who_reads_a_journal_does_not_keep_its_job_from_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str
) -> None:
    monkeypatch.setattr(look, "PAGE", 4)
    output = tmp_path / "out.jsonl"
    folder_of(output).mkdir()
    with closing(Journal(folder_of(output), mounts)) as journal:
        fill(journal, list(range(1, 20)))
        journal._database.execute("PRAGMA busy_timeout=50")
        with look.View(output) as view:
            seen = []
            for line, status, _ in view.stats():
                assert status == "ok"
                seen.append(line)
                if line < 20:
                    fill(journal, [20 * line])
    rest = [line for line in seen if line >= 20]
    assert seen[:19] == list(range(1, 20)) and seen == sorted(seen) and bool(rest) == bool(mounts)


def test_a_job_can_move_between_file_systems(tmp_path: Path) -> None:
    for line, mounts in enumerate(("", NETWORK, ""), 1):
        with closing(Journal(tmp_path, mounts)) as journal:
            fill(journal, [line])
            assert journal.counts.total() == line


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/", False), ("/home/x", False), ("/home/x/far/y", True), ("/home/xfar", False), ("/a b/c", True), ("/f", True)],
)
def test_the_mount_that_holds_a_folder_decides(folder: str, expected: bool) -> None:
    mounts = "\n".join(
        (
            "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
            "2 1 0:2 / /home/x/far rw - nfs server:/far rw,vers=3",
            "3 1 0:3 / /a\\040b rw master:2 - cifs //server/share rw",
            "4 1 0:4 / /f rw - ext4 /dev/sdb rw",
            "5 1 0:5 / /f rw - fuse.sshfs host:/ rw",
        )
    )
    assert on_network(Path(folder), mounts) is expected
