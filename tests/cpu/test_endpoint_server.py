"""A job over a real server, killed and continued. Skipped where neither llama.cpp's nor vLLM's is installed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.prove_endpoint import AMPLE, Serving, missing, no_vllm, rows, serving, serving_vllm
from shoal.jobs.report import read_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("peer", ["llamacpp", "vllm"])
def test_every_row_is_answered_once_by_a_real_server_also_after_a_kill(tmp_path: Path, peer: str) -> None:
    if why := missing() if peer == "llamacpp" else no_vllm():
        pytest.skip(why)
    serve: Serving = serving if peer == "llamacpp" else serving_vllm(AMPLE)
    url = "/v1/chat/completions" if peer == "llamacpp" else "/v1/completions"  # its model has no chat template
    asked = rows(3, 4 if peer == "llamacpp" else 16, 40, url)
    (tmp_path / "in.jsonl").write_text("\n".join(asked) + "\n")
    out = tmp_path / "out.jsonl"
    with serve(tmp_path / "server.log") as address:
        command = [sys.executable, "-m", "shoal", "run", "-q", "-i", str(tmp_path / "in.jsonl"), "-o", str(out)]
        command += ["--endpoint", address]
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        begun = len(out.read_text().splitlines())
        assert subprocess.run(command, cwd=ROOT).returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < begun <= len(lines) == len(asked)
    assert [line["custom_id"] for line in lines] == [json.loads(row)["custom_id"] for row in asked]
    assert all(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)
    report = read_report(out)
    assert report.rows.ok == len(asked) and not report.problems() and report.tokens.output > 0
