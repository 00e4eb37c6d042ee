"""The command itself, in processes, with the embedded model: exit codes, signals, and an engine that a row kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLY = "kill"

# A command whose engine has the policy below, and that says at its end whether it has loaded torch.
WITH_DEADLY_POLICY = """
import sys
from dataclasses import replace
from shoal.cli import main
from shoal.jobs.engines import Engines
load = Engines._load
def load_deadly(engines, config, *more):
    load(engines, replace(config, policy="deadly_policy:Deadly", max_sequences=2), *more)
Engines._load = load_deadly
try:
    main()
finally:
    print("torch" in sys.modules)
"""


def row(number: int, text: str, **body: object) -> str:
    messages = [{"role": "user", "content": text}]
    body = {"model": "minnow", "messages": messages, "max_tokens": 6, **body}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in rows))
    return path


def start(source: Path, output: Path, *more: str, script: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, *(["-c", script] if script else ["-m", "shoal"])]
    command += ["run", "-i", str(source), "-o", str(output), "--quiet", "--threads", "1", "--memory", "64MB", *more]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def run(source: Path, output: Path, *more: str, script: str = "") -> tuple[int, str, str]:
    """Exit code, what it printed, and its messages."""
    process = start(source, output, *more, script=script)
    printed, messages = process.communicate(timeout=120)
    return process.returncode, printed, messages


def until(process: subprocess.Popen[str], so: Callable[[], bool]) -> None:
    """Wait for something that the process does."""
    for _ in range(2400):
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            if so():
                return
        else:
            break
    raise AssertionError(f"it ended before: {process.communicate()}")


def report(output: Path) -> dict:
    return json.loads((output.with_name(output.name + ".shoal") / "report.json").read_text())


LONG = [row(i, f"Copy: the fish number {i}", max_tokens=400, ignore_eos=True) for i in range(48)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job over LONG that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    output = folder / "out.jsonl"
    code, printed, messages = run(write(folder / "in.jsonl", LONG), output)
    assert (code, printed, messages) == (0, "", "")
    return output


def test_a_signal_to_all_its_processes_ends_the_command_and_it_goes_on(unbroken: Path, tmp_path: Path) -> None:
    """As from a service manager: the engine gets it too, and ends by it."""
    output = tmp_path / "out.jsonl"
    source = unbroken.with_name("in.jsonl")
    process = start(source, output)
    steps = tmp_path / "out.jsonl.shoal" / "steps.jsonl"
    until(process, lambda: steps.exists() and steps.stat().st_size > 0)
    os.killpg(process.pid, signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 5, messages
    assert "Traceback" not in messages
    assert not report(output)["finished"]
    assert run(source, output)[0] == 0
    assert output.read_bytes() == unbroken.read_bytes()
    assert report(output)["runs"] == 2


def test_a_row_that_kills_the_engine_fails_alone(tmp_path: Path) -> None:
    rows = [row(0, "Add 1 and 2."), row(1, f"Please {DEADLY} it."), row(2, "Sort: 3 1 2")]
    output = tmp_path / "out.jsonl"
    code, printed, messages = run(write(tmp_path / "in.jsonl", rows), output, script=WITH_DEADLY_POLICY)
    assert (code, printed.strip()) == (3, "False"), messages
    assert [json.loads(line)["custom_id"] for line in output.read_text().splitlines()] == ["r0", "r2"]
    (failed,) = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert failed["response"]["body"]["error"]["code"] == "engine_died" and failed["x_shoal"]["line"] == 2
    assert report(output)["engine_restarts"] == 3


def test_mistakes_end_with_2_and_a_sentence(unbroken: Path, tmp_path: Path) -> None:
    source = unbroken.with_name("in.jsonl")
    taken = write(tmp_path / "taken.jsonl", ["mine"])
    for output, more, said in [
        (taken, (), "--overwrite"),
        (tmp_path / "a.jsonl", ("--model", str(tmp_path / "nothing")), "is not a folder"),
        (unbroken, ("--seed", "7"), "seed was 0, is 7"),
    ]:
        code, _, messages = run(source, output, *more)
        assert code == 2 and said in messages and "Traceback" not in messages
    assert taken.read_text() == "mine\n"


def test_too_many_bad_lines_end_with_4(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["broken", row(1, "Add 1 and 2.")])
    output = tmp_path / "out.jsonl"
    assert run(source, output, "--max-failures", "1%")[0] == 4
    assert report(output)["rows"] == {"total": 2, "ok": 0, "failed": 1, "expired": 0, "cancelled": 0}
    assert run(source, output, "--max-failures", "1")[0] == 3
