"""`--engine vllm`: a server of our own is started, asked, started again and ended; nothing of it is left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shoal import run as run_files
from shoal.core.errors import ShoalError, StateError, UsageError
from shoal.jobs.options import JobOptions, place_of
from shoal.jobs.report import Report, read_report
from shoal.jobs.run import run_job
from shoal.remote import own
from shoal.remote.vllm import Installed, Wishes, command
from tests.null.bad_server import answer_to
from tests.null.echo_job import chat

ROOT = Path(__file__).resolve().parents[2]
ROWS = [chat(i, f"Question {i}", model=f"model {i % 2}") for i in range(40)]


class Place:
    """A folder with a job over a python that pretends to have vLLM."""

    def __init__(self, folder: Path) -> None:
        self.root, self.notes, self.said = folder, folder / "notes", ""
        self.notes.mkdir()
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m tests.null.pretend_vllm "$@"\n')
        self.python.chmod(0o755)
        (folder / "in.jsonl").write_text("\n".join(ROWS) + "\n")
        self.out = folder / "out.jsonl"

    def run(self, **more: Any) -> int:
        console = Console(file=io.StringIO(), width=400)
        options = JobOptions(input=self.root / "in.jsonl", output=self.out, device="vllm", **more)
        try:
            return run_job(options, console=console)
        finally:
            self.said = console.file.getvalue()  # type: ignore[attr-defined]

    @property
    def report(self) -> Report:
        return read_report(self.out)

    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(each.read_text()) for each in sorted(self.notes.glob("start*"))]

    def check(self) -> None:
        """Every row has its own answer, once and in order, and nothing that was started still runs."""
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]
        assert texts == [answer_to(f"Question {i}") for i in range(len(ROWS))]
        assert self.gone(0.0)

    def gone(self, seconds: float) -> bool:
        """Whether all that was started has ended, within so many seconds."""
        end = time.monotonic() + seconds
        while left := [one for start in self.starts() for one in start["processes"] if lives(one)]:
            if time.monotonic() > end:
                return not left
            time.sleep(0.02)
        return True


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(tmp_path)
    monkeypatch.setenv("SHOAL_PEER_VLLM", str(found.python))
    monkeypatch.setenv("PRETEND_NOTES", str(found.notes))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # for the world outside, not for a server of our own
    return found


def test_a_job_starts_vllm_asks_it_and_ends_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert place.run(memory=3 << 30, step_tokens=512, threads=1) == 0
    place.check()
    (start,) = place.starts()
    words, environment = " ".join(start["words"]), start["environment"]
    for each in ("--kv-cache-memory-bytes 3221225472", "--max-num-batched-tokens 512", "--served-model-name minnow"):
        assert each in words
    assert environment["OMP_NUM_THREADS"] == "1" and environment["VLLM_CPU_OMP_THREADS_BIND"].isdigit()
    assert not {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"} & environment.keys()
    assert environment["VLLM_API_KEY"] not in words
    assert "vLLM 9.9 answers after" in place.said
    assert "minnow answers all" in place.said
    log = Path(f"{place.out}.shoal/vllm.log")
    assert "pretended weights" in log.read_text() and environment["VLLM_API_KEY"] not in log.read_text()
    assert place.report.endpoints == ["vllm"] and place.report.seconds.load > 0 and not place.report.problems()
    assert place.run() == 0 and len(place.starts()) == 1, "a job that has ended needs no server"


def test_a_server_that_dies_is_started_again_and_no_row_is_lost_or_doubled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_DIES", "Question 17")
    (place.notes / "die").touch()
    assert place.run() == 0
    place.check()
    assert len(place.starts()) == 2 and place.starts()[0]["words"] == place.starts()[1]["words"]
    assert "ended by itself (signal SIGKILL); it is started again" in place.said and "answers again" in place.said
    asked = (place.notes / "asked").read_text().splitlines()
    assert set(asked) == {f"Question {i}" for i in range(len(ROWS))}


def test_a_server_that_dies_each_time_ends_the_job_and_costs_no_row(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_DIES", "Question")
    monkeypatch.setattr(own, "DEATHS", 2)
    for number in range(5):
        (place.notes / f"die{number}").touch()
    with pytest.raises(ShoalError, match="2 times without an answer") as caught:
        place.run()
    assert "Loading pretended weights" in str(caught.value) and place.gone(0.0)
    assert not (place.root / "out.errors.jsonl").exists()
    for left in place.notes.glob("die*"):
        left.unlink()
    assert place.run() == 0
    place.check()


def test_a_server_that_does_not_start_ends_the_job_with_its_last_words(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_FAILS", "1")
    with pytest.raises(ShoalError, match="no room for the KV cache") as caught:
        place.run()
    assert "exit code 1" in str(caught.value) and "vllm.log" in str(caught.value)


@pytest.mark.parametrize("victim", ["the job", "the guard"])
def test_nothing_is_left_when_somebody_is_killed(place: Place, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "shoal", "run", "-q", "-i", str(place.root / "in.jsonl"), "-o", str(place.out)]
    process = subprocess.Popen([*command, "--engine", "vllm"], cwd=ROOT)
    while not (place.notes / "asked").exists():
        assert process.poll() is None
        time.sleep(0.01)
    first = place.starts()[0]["processes"]
    if victim == "the job":
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert place.gone(5.0)
        assert subprocess.run(command, cwd=ROOT, env={**os.environ, "SHOAL_ENGINE": "vllm"}).returncode == 0
    else:
        guard = int(Path(f"/proc/{first[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGKILL)
        assert process.wait(30) == 0
        assert not lives(first[0]), "the server itself ends with its guard"
        os.kill(first[1], signal.SIGKILL)  # its helper is its own to end
        assert place.gone(2.0)
    place.check()
    assert len(place.starts()) == 2


def test_without_vllm_it_is_said_what_to_do(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_NONE", "1")
    with pytest.raises(UsageError, match="has no vLLM: install it"):
        place.run()
    monkeypatch.setenv("SHOAL_PEER_VLLM", str(place.root / "nobody"))
    with pytest.raises(UsageError, match="nobody, which says nothing"):
        place.run()
    monkeypatch.delenv("SHOAL_PEER_VLLM")
    with pytest.raises(UsageError, match="has no vLLM: install it"):  # the python that runs us
        run_files(place.root / "in.jsonl", place.out, engine="vllm")
    assert not place.out.exists() and not place.starts()


def test_other_weights_are_another_job(place: Place) -> None:
    model = place.root / "model"
    model.mkdir()
    (model / "config.json").write_text('{"dtype": "float32"}')
    (model / "model.safetensors").write_bytes(b"one")
    assert place.run(model=str(model)) == 0
    assert "--dtype float32" in " ".join(place.starts()[0]["words"])
    (model / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StateError, match="model.safetensors"):
        place.run(model=str(model))


def test_strict_holds_rows_to_the_model(place: Place) -> None:
    assert place.run(strict=True) == 3
    assert place.report.errors["model_not_found"].count == len(ROWS) and not place.starts()


def test_what_vllm_cannot_be_told_is_refused() -> None:
    where = {"input": Path("a"), "output": Path("b"), "device": "vllm"}
    for name, value in {"kv": "int8", "weights": "int8", "verify": 0.1, "seed": 3, "adapter": {"a": "b"}}.items():
        with pytest.raises(UsageError, match="--engine vllm"):
            JobOptions(**where, **{name: value})  # type: ignore[arg-type]
    for more in ({"endpoint": "http://a/v1", "engine": "vllm"}, {"endpoint": None, "engine": "sglang"}):
        with pytest.raises(UsageError, match="--engine"):
            place_of("cpu", **more)
    with pytest.raises(UsageError):
        JobOptions(**where | {"device": place_of("tpu", None, "vllm")})
    with pytest.raises(UsageError):
        JobOptions(**where, memory=-1)
    for devices in ("0,1", "cuda:0,cuda:1", "cpu:0, cpu:1"):
        with pytest.raises(UsageError, match="names several"):
            JobOptions(**where | {"device": place_of(devices, None, "vllm")})


def test_a_vllm_built_for_processors_is_asked_for_no_card(place: Place) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="was built for processors"):
            run_files(place.root / "in.jsonl", place.out, engine="vllm", device=device)
    assert not place.out.exists() and not place.starts()


def test_flags_of_ours_become_flags_of_vllm() -> None:
    wishes = Wishes(Path("/m"), "m", device="cuda:1")
    on_gpu = command(Installed("/p", "1", False), wishes, 1, "k", {"A": "b"})
    assert on_gpu.environment["CUDA_VISIBLE_DEVICES"] == "1" and on_gpu.environment["A"] == "b"
    assert "--kv-cache-memory-bytes" not in on_gpu.words and "OMP_NUM_THREADS" not in on_gpu.environment
    wishes = Wishes(Path("/m"), "m")
    mine = {"VLLM_CPU_KVCACHE_SPACE": "9", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    held = command(Installed("/p", "1", True), wishes, 1, "k", mine)
    assert mine.items() <= held.environment.items() and "--kv-cache-memory-bytes" not in held.words
    free = command(Installed("/p", "1", True), wishes, 1, "k", {})
    assert free.words[free.words.index("--kv-cache-memory-bytes") + 1] == str(4 << 30)
    assert free.environment["VLLM_CPU_OMP_THREADS_BIND"].split(",") == [str(i) for i in sorted(os.sched_getaffinity(0))]
