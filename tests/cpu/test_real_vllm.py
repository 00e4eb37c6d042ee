"""`--engine vllm` with the real one: a job is answered, and nothing is left of the server when the job is killed.

Skipped where SHOAL_PEER_VLLM names no python that has vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.prove_endpoint import no_vllm, rows
from shoal.jobs.report import read_report
from shoal.text.checkpoint import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
EAGER = {"VLLM_CPU_CI_ENV": "1"}  # it compiles nothing: this is about rows, not about their pace


def of_group(leader: int) -> set[int]:
    """Processes in a group, dead ones apart."""
    found = set()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (each / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended
        if int(group) == leader and state != "Z":
            found.add(int(each.name))
    return found


def leader_of(model: Path) -> int:
    """The process that serves this model."""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"vllm.entrypoints.openai.api_server" in words and str(model).encode() in words:
            return int(each.name)
    raise AssertionError(f"nobody serves {model}")


def test_a_job_is_answered_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    if why := no_vllm():
        pytest.skip(why)
    model = tmp_path / "model"  # a path that nobody else has
    model.symlink_to(EMBEDDED)
    (tmp_path / "in.jsonl").write_text("\n".join(rows(3, 400, 150)) + "\n")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "shoal", "run", "-q", "-i", str(tmp_path / "in.jsonl"), "-o", str(out)]
    command += ["--engine", "vllm", "--model", str(model), "--memory", "256MiB"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | EAGER)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.02)
    leader = leader_of(model)
    assert len(of_group(leader)) >= 3  # the server, its engine, the engine's worker
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10.0
    while left := of_group(leader):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert subprocess.run(command, cwd=ROOT, env=os.environ | EAGER).returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(1200)]
    report = read_report(out)
    assert report.rows.ok == 1200 and not report.problems()
    assert report.seconds.load > 0 and report.sent.prompt_cached > 0
