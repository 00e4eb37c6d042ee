"""Killed anywhere between `shoal run` and the end of `shoal retry`, both files end as those of unbroken commands."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import syscall_faults
from durable_job import memory_folder
from faulty import LOSSES, Crash, FaultyFiles, Loss
from retried_job import RetryJob
from syscall_faults import Setting

from shoal.core.errors import ShoalError
from shoal.jobs.files import DiskFiles
from shoal.jobs.write import Order

ROWS = 16


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def make(folder: Path, name: str, hopeless: bool = True, order: Order = "input") -> RetryJob:
    (folder / name).mkdir()
    return RetryJob(folder / name, ROWS, hopeless, order)


@pytest.mark.parametrize(("hopeless", "order"), [(True, "input"), (False, "input"), (True, "finish")])
def test_what_runs_again_is_in_its_place_and_nothing_else_has_changed(
    folder: Path, hopeless: bool, order: Order
) -> None:
    job = make(folder, "job", hopeless, order)
    assert job.run(DiskFiles()) == 3
    answered = [json.loads(line)["line"] for line in job.out.read_text().splitlines()]
    failed = [line for line in job.lines if hopeless and line % 5 == 0]
    assert sorted(answered) == [line for line in job.lines if line not in failed]
    assert answered == sorted(answered) or order == "finish"
    assert job.errors.exists() == hopeless
    assert not list(folder.rglob("retried.*"))
    if hopeless:
        assert len(job.errors.read_text().splitlines()) == len(failed)


@pytest.mark.parametrize("hopeless", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_at_every_point_changes_no_byte(folder: Path, loss: Loss, hopeless: bool) -> None:
    whole = make(folder, "unbroken", hopeless)
    files = FaultyFiles()
    whole.run(files)
    wanted = whole.final()
    for at in range(files.count):
        job = make(folder, f"crash{at}", hopeless)
        broken = FaultyFiles(at)
        with pytest.raises(Crash):
            job.run(broken)
        broken.crash(loss, Random(at))
        assert job.run(DiskFiles()) == 3
        assert job.final() == wanted, f"crash at operation {at}"


def test_until_all_has_ended_both_files_are_those_of_before(folder: Path) -> None:
    """Stopped at any operation, the two files are both the old ones or both the new, but for the moment between."""
    whole = make(folder, "unbroken")
    files = FaultyFiles()
    whole.run(files)
    new = whole.out.read_bytes(), whole.errors.read_bytes()
    seen = []
    for at in range(files.count):
        job = make(folder, f"crash{at}")
        with pytest.raises(Crash):
            job.run(FaultyFiles(at))
        if (job.out.with_name("answers.jsonl.shoal") / "retried.output").exists() or seen:
            seen.append((job.out.read_bytes(), job.errors.read_bytes()))
    old, mixed = seen[0], (new[0], seen[0][1])
    assert old != new and len(seen) > 8
    assert set(seen) == {old, mixed, new}
    assert seen == sorted(seen, key=[old, mixed, new].index) and seen.count(mixed) <= 3


@pytest.mark.parametrize("loss", ("lost", "scattered", "kept"))
def test_a_crash_while_another_retry_takes_more_rows_changes_no_byte(folder: Path, loss: Loss) -> None:
    """The first retry has written some lines when it is stopped; the second runs all that failed."""
    whole = make(folder, "unbroken")
    files = FaultyFiles()
    whole.run(files)

    def stopped(name: str) -> RetryJob:
        job = make(folder, name)
        with pytest.raises(Crash):
            job.run(FaultyFiles(middle))
        job.every = True
        return job

    retried = Path("answers.jsonl.shoal", "retried.output")
    for middle in range(files.count - 1, 0, -1):
        job = stopped(f"middle{middle}")
        if (job.root / retried).exists() and (job.root / retried).stat().st_size < whole.out.stat().st_size // 2:
            break
    counted = FaultyFiles()
    job.retry(counted)
    assert job.final() == whole.final() and counted.count > 20
    for at in range(counted.count):
        job = stopped(f"crash{at}")
        broken = FaultyFiles(at)
        with pytest.raises(Crash):
            job.retry(broken)
        broken.crash(loss, Random(at))
        job.retry(DiskFiles())
        assert job.final() == whole.final(), f"crash at operation {at}"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_refusal_at_every_point_can_be_resumed(folder: Path, error: int) -> None:
    whole = make(folder, "unbroken")
    files = FaultyFiles()
    whole.run(files)
    for at in range(files.count):
        job = make(folder, f"refused{at}")
        with pytest.raises(ShoalError, match="again to continue"):
            job.run(FaultyFiles(at, error))
        assert job.run(DiskFiles()) == 3
        assert job.final() == whole.final(), f"refused at operation {at}"


@pytest.fixture
def library(folder: Path) -> Path:
    if syscall_faults.compiler() is None:
        pytest.skip("needs a C compiler on Linux")
    return syscall_faults.build(folder)


def test_a_power_cut_between_any_two_system_calls_changes_no_byte(folder: Path, library: Path) -> None:
    setting = Setting(rows=6, retry=True)
    operations = syscall_faults.record(library, folder, setting)
    renamed = [one.target.name for one in operations if one.kind == "R"]
    assert {"answers.jsonl", "answers.errors.jsonl"} <= set(renamed)
    assert syscall_faults.replay(operations, folder, setting, ("lost", "scattered")) == (len(operations) + 1) * 2


def test_a_refused_system_call_is_told_and_can_be_resumed(folder: Path, library: Path) -> None:
    found = syscall_faults.refuse(library, folder, Setting(rows=6, retry=True, step=3), errno.EIO, sticky=False)
    assert found["told"] + found["tolerated"] > 20
