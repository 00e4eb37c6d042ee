"""Engine processes beside each other, with the embedded model: the bytes of one, also when one of them is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from test_run_command import LONG, report, row, run, start, until, write

CORES = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="two engines need two cores")


def engines_of(pid: int) -> list[psutil.Process]:
    """The engine processes of a command."""
    found = []
    for child in psutil.Process(pid).children():
        if "shoal.host" in child.cmdline():
            found.append(child)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job over LONG, on one device."""
    output = tmp_path_factory.mktemp("alone") / "out.jsonl"
    code, _, messages = run(write(output.with_name("in.jsonl"), LONG), output)
    assert code == 0, messages
    return output


def test_two_processes_leave_the_bytes_of_one_and_keep_to_their_cores(alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(alone.with_name("in.jsonl"), output, "--devices", "0,1")
    steps = tmp_path / "out.jsonl.shoal" / "steps.jsonl"
    until(process, lambda: steps.exists() and steps.stat().st_size > 0)
    kept = [set(engine.cpu_affinity()) for engine in engines_of(process.pid)]
    assert len(kept) == 2 and not kept[0] & kept[1] and kept[0] | kept[1] <= set(CORES)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert output.read_bytes() == alone.read_bytes()
    found = report(output)
    assert [engine["rows"] > 0 for engine in found["engines"]] == [True, True]
    assert found["tokens"]["prompt_computed"] <= found["tokens"]["prompt_bound"] + found["again"]["apart"]


def test_a_killed_engine_costs_no_row_and_the_job_goes_on_with_one_device(alone: Path, tmp_path: Path) -> None:
    output, source = tmp_path / "out.jsonl", alone.with_name("in.jsonl")
    process = start(source, output, "--device", "cpu:0,cpu:1")
    steps = tmp_path / "out.jsonl.shoal" / "steps.jsonl"
    until(process, lambda: steps.exists() and steps.stat().st_size > 0)
    engines_of(process.pid)[1].kill()
    until(process, lambda: len(engines_of(process.pid)) == 2)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 5 and "Traceback" not in messages, messages
    assert report(output)["engine_restarts"] == 1
    assert run(source, output)[0] == 0
    assert output.read_bytes() == alone.read_bytes() and report(output)["runs"] == 2


def test_a_device_too_many_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(0, "Add 1 and 2.")])
    many = ",".join(str(number) for number in range(len(CORES) + 1))
    code, _, messages = run(source, tmp_path / "out.jsonl", "--devices", many)
    assert code == 2 and "name fewer devices" in messages
    assert not (tmp_path / "out.jsonl.shoal").exists()
