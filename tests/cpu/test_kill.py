"""Kill the main job, run it again: the bytes of an unbroken run. These are `benchmarks/prove_kill.py` and
`benchmarks/prove_kill_everything.py` at a small size."""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random

import pytest

from benchmarks import prove_kill_everything as everything
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


def test_a_job_with_everything_switched_on_and_its_retry_may_be_killed_too(tmp_path: Path) -> None:
    whole = everything.Unbroken(tmp_path, ROWS, seed=3)
    assert whole.wrong == []
    facts = whole.facts()
    assert facts["answered_first"]["structured"] > 5 and facts["lines_generated_by_retry"] > 1
    assert whole.run_codes.keys() >= {"invalid_constraint", "invalid_json_line", "duplicate_custom_id"}
    whole.run_scale, whole.retry_scale = (whole.run_scale[0], 0.0), (whole.retry_scale[0], 0.0)
    found = everything.trial(tmp_path / "job", whole, Random(2))
    assert [one["wrong"] for one in found] == [[], []]
    assert all(one["kills"] for one in found), "the job was killed, and its retry"


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
