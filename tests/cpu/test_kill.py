"""Kill the main job, run it again: the bytes of an unbroken run. This is `benchmarks/prove_kill.py` at a small size."""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random

import pytest

from benchmarks.prove_kill import EXIT_FAILED_LINES, VICTIMS, Job, second_run_is_refused, trial, wait_for, write_rows

ROWS = 40
EXIT_INTERRUPTED = 5


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("kill")
    write_rows(folder / "in.jsonl", ROWS, seed=3)
    job = Job(folder / "unbroken", folder / "in.jsonl")
    with job.life() as process:
        assert process.wait() == EXIT_FAILED_LINES, job.messages.read_text()
    assert sum(content.count(b"\n") for content in job.files()) == ROWS
    return job


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_job_ends_in_the_same_bytes(unbroken: Job, tmp_path: Path, victim: str) -> None:
    source = unbroken.log.parent.parent / "in.jsonl"
    scale = (unbroken.log.stat().st_size, 0.0)
    found = trial(tmp_path / "job", source, unbroken.files(), Random(VICTIMS.index(victim)), scale, [victim])
    assert found["kills"] == [victim] and found["wrong"] == []


def test_an_interrupted_job_lets_nobody_in_says_so_and_goes_on(unbroken: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "job", unbroken.log.parent.parent / "in.jsonl")
    for number in (signal.SIGTERM, signal.SIGINT):
        with job.life() as process:
            assert wait_for(job, process, job.log.stat().st_size + 1, 0.0)
            if number is signal.SIGTERM:
                process.suspend()
                assert second_run_is_refused(job, process) == []
                process.resume()
            process.send_signal(number)
            assert process.wait() == EXIT_INTERRUPTED, job.messages.read_text()
        job.note_journalled()
    with job.life() as process:
        assert process.wait() == EXIT_FAILED_LINES, job.messages.read_text()
    assert job.files() == unbroken.files() and job.generated_again() == []
