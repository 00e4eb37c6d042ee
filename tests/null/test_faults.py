"""Whatever moment a job is stopped at, and whatever the disk forgets, running it again ends in the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import syscall_faults
from durable_job import Job, memory_folder, payload, shuffled, status
from faulty import LOSSES, Crash, FaultyFiles, Loss
from syscall_faults import Setting

from shoal.core.errors import ShoalError
from shoal.jobs.files import DiskFiles

LINES = tuple(line for line in range(1, 23) if line % 11)  # lines 11, 22, … are blank


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def make(folder: Path, name: str, **options: object) -> Job:
    root = folder / name
    root.mkdir()
    return Job(root, LINES, shuffled(LINES, seed=1), seconds=0.4, **options)  # type: ignore[arg-type]


def unbroken(folder: Path, **options: object) -> dict[str, bytes]:
    job = make(folder, "unbroken", **options)
    assert job.run(DiskFiles()) == 3
    return job.final()


def points(folder: Path, **options: object) -> int:
    """Return how many operations a whole job asks of its files."""
    files = FaultyFiles()
    make(folder, "counted", **options).run(files)
    return files.count


def test_the_unbroken_run_is_what_the_answers_say(folder: Path) -> None:
    final = unbroken(folder)
    ok = [payload(line) for line in LINES if status(line) == "ok"]
    bad = [payload(line) for line in LINES if status(line) != "ok"]
    assert final["answers.jsonl"] == b"".join(line + b"\n" for line in ok)
    assert final["answers.errors.jsonl"] == b"".join(line + b"\n" for line in bad)
    assert final["rows.jsonl"].count(b"\n") == len(LINES)


@pytest.mark.parametrize(
    ("loss", "form"), [*((loss, "jsonl") for loss in LOSSES), ("scattered", "csv"), ("lost", "parquet")]
)
def test_a_crash_at_every_point_changes_no_byte(folder: Path, loss: Loss, form: str) -> None:
    wanted = unbroken(folder, form=form)
    for at in range(points(folder, form=form)):
        job = make(folder, f"crash{at}", form=form)
        files = FaultyFiles(at)
        with pytest.raises(Crash):
            job.run(files)
        files.crash(loss, Random(at))
        assert job.run(DiskFiles()) == 3
        assert job.final() == wanted, f"crash at operation {at}"
        assert max(job.generated.values()) <= 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_while_mending_a_crash_changes_no_byte(folder: Path, loss: Loss) -> None:
    wanted = unbroken(folder)
    total = points(folder)
    random = Random(7)
    for number in range(10):
        job = make(folder, f"again{number}")
        for _ in range(12):
            files = FaultyFiles(random.randrange(total // 2))
            try:
                job.run(files)
            except Crash:
                files.crash(loss, random)
                continue
            break
        job.run(DiskFiles())
        assert job.final() == wanted, f"number {number}"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("sticky", [True, False])
def test_a_refusal_at_every_point_can_be_resumed(folder: Path, error: int, sticky: bool) -> None:
    wanted = unbroken(folder)
    for at in range(points(folder)):
        job = make(folder, f"refused{at}")
        with pytest.raises(ShoalError, match="again to continue") as raised:
            job.run(FaultyFiles(at, error, sticky))
        assert raised.value.exit_code == 1
        assert job.run(DiskFiles()) == 3
        assert job.final() == wanted, f"refused at operation {at}"


@pytest.mark.parametrize("loss", LOSSES)
def test_finish_order_doubles_nothing(folder: Path, loss: Loss) -> None:
    wanted = unbroken(folder, order="finish")
    for at in range(points(folder, order="finish")):
        job = make(folder, f"crash{at}", order="finish")
        files = FaultyFiles(at)
        with pytest.raises(Crash):
            job.run(files)
        files.crash(loss, Random(at))
        job.run(DiskFiles())
        final = job.final()
        for name, data in wanted.items():
            assert sorted(final[name].splitlines()) == sorted(data.splitlines()), f"crash at operation {at}: {name}"


@pytest.fixture
def library(folder: Path) -> Path:
    if syscall_faults.compiler() is None:
        pytest.skip("needs a C compiler on Linux")
    return syscall_faults.build(folder)


WAL = Setting(rows=9)
ROLLBACK = Setting(rows=5, network=True)


@pytest.mark.parametrize("setting", [WAL, ROLLBACK], ids=["wal", "rollback"])
def test_a_power_cut_between_any_two_system_calls_changes_no_byte(
    folder: Path, library: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting.network:
        monkeypatch.setattr("shoal.jobs.journal.read_mounts", lambda: syscall_faults.NETWORK)
    operations = syscall_faults.record(library, folder, setting)
    kind = "journal.db-journal" if setting.network else "journal.db-wal"
    assert sum(one.path.name == kind for one in operations) > 20
    restarts = syscall_faults.replay(operations, folder, setting, ("lost", "scattered"))
    assert restarts == (len(operations) + 1) * 2


@pytest.mark.parametrize(
    ("setting", "error", "sticky"),
    [(WAL, errno.ENOSPC, True), (WAL, errno.EIO, False), (ROLLBACK, errno.ENOSPC, False)],
    ids=["wal-full", "wal-broken-once", "rollback-full-once"],
)
def test_a_refused_system_call_is_told_and_can_be_resumed(
    folder: Path, library: Path, setting: Setting, error: int, sticky: bool
) -> None:
    found = syscall_faults.refuse(library, folder, setting, error, sticky)
    assert found["told"] + found["tolerated"] == found["operations"] > 50
    assert found["tolerated"] == 0 or not sticky  # what SQLite does without, it does without for good reason


def test_the_whole_job_survives_power_cuts_and_refusals(folder: Path, library: Path) -> None:
    setting = Setting(rows=15, whole=True, step=23)
    operations = syscall_faults.record(library, folder, setting)
    assert syscall_faults.replay(operations, folder, setting, ("lost", "scattered")) > 10
    found = syscall_faults.refuse(library, folder, setting, errno.ENOSPC, sticky=True)
    assert found["told"] > 5
