"""`shoal top` shows a job that is read, runs, was killed, or has ended, and changes nothing of it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from echo_job import ROWS, EchoJob, Watched, chat, echo_backend
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli import call
from test_live_report import MIXED, broken_at, meta
from whole_job import SteppingClock

from shoal.show import top
from shoal.show.frame import BLOCKS, frame, spark
from shoal.show.top import Looker, run_top

Jobs = Callable[..., EchoJob]
ROOT = Path(__file__).resolve().parents[2]


def shown(output: Path, once: bool = True, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=terminal, _environ={})
    run_top(output, once, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def killed(one: EchoJob) -> EchoJob:
    with pytest.raises(KeyboardInterrupt), mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(30)))
    return one


@contextmanager
def held(one: EchoJob) -> Iterator[None]:
    """As if a run were at work on it."""
    descriptor = os.open(one.state / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def test_of_a_running_job_it_shows_how_far_how_fast_and_what_failed(job: Jobs) -> None:
    one, pictures = job([*MIXED[:90], *(chat(i, max_tokens=200, ignore_eos=True) for i in range(300, 330))]), []

    def look(rounds: int) -> None:
        if rounds % 60 == 1:
            pictures.append(shown(one.out))

    with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), look))
    assert "loading the model" in pictures[0] and "/120 rows" in pictures[0]
    late = pictures[-1]
    for words in ("running", "/120 rows, 1 failed", "tokens/s", "left", "requests", "longest now", "has run for"):
        assert words in late
    assert one.report.errors and next(iter(one.report.errors)) in late and "(yours), as line 61" in late
    assert any(block in late for block in BLOCKS)


def test_of_a_killed_job_it_says_that_it_is_dead_and_how_to_go_on(job: Jobs) -> None:
    one = killed(job(MIXED))
    before = (one.state / "journal.db").read_bytes()
    for terminal in (False, True):
        said = shown(one.out, once=False, terminal=terminal)  # and does not wait
        assert "not running: stopped or killed, last seen 20" in said and "run the same command again" in said
    assert (one.state / "journal.db").read_bytes() == before


def test_of_a_finished_job_it_shows_the_whole(job: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(MIXED)
    one.run()
    assert call("top", str(one.state), "--once") == 0
    said = capsys.readouterr().out
    assert "finished, with failed lines" in said and "121/121 rows" in said and "all its time" in said


def test_before_there_is_a_journal_it_says_that_the_input_is_read(job: Jobs) -> None:
    one = killed(job(MIXED))
    (one.state / "journal.db").unlink()
    with held(one):
        assert "reading and planning the input" in shown(one.out)
    assert call("top", str(one.out), "--once") == 2


def test_counts_that_do_not_add_up_are_loud_here_too(job: Jobs) -> None:
    one = job(MIXED)
    one.run()
    meta(one, "DELETE FROM results WHERE line IN (2, 5)")
    assert "DO NOT ADD UP" in shown(one.out) and call("top", str(one.out), "--once") == 1


def test_a_job_that_has_not_spoken_for_long_is_said_to_be_silent(job: Jobs) -> None:
    one = killed(job(MIXED))
    with held(one):
        seen = Looker(one.out).look()
        console = Console(file=io.StringIO(), width=130)
        with mock.patch.object(time, "time", lambda: 1e10):
            console.print(frame(Looker(one.out).look()))
    assert seen.running and "Its last word is" in console.file.getvalue()  # type: ignore[attr-defined]


def test_it_leaves_when_the_job_ends(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    one, looks = killed(job(MIXED)), iter([True, True, True, False])
    monkeypatch.setattr(top, "is_running", lambda output: next(looks))
    monkeypatch.setattr(top, "EVERY", 0.0)
    assert "not running" in shown(one.out, once=False, terminal=True)
    assert next(looks, None) is None


def test_rows_are_counted_less_often_where_it_takes_long(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    one, counted, real = killed(job(MIXED)), [], top.look_report

    def slow(output: Path) -> object:
        counted.append(output)
        time.sleep(0.02)
        return real(output)

    monkeypatch.setattr(top, "look_report", slow)
    with held(one):
        looker = Looker(one.out)
        for _ in range(5):
            looker.look()
    assert len(counted) == 1


def at_a_terminal() -> None:
    """What a shell does for a command; and whoever runs the tests in the background has switched Ctrl-C off."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_a_key_ends_it_and_the_terminal_is_as_before(job: Jobs, key: bytes) -> None:
    one = killed(job(ROWS))
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "shoal", "top", str(one.out)]
    with held(one):
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=at_a_terminal,
        )  # fmt: skip
        said = b""
        while b"/120 rows" not in said:
            assert select.select([ours], [], [], 60)[0], said
            said += os.read(ours, 65536)
        os.write(ours, key)
        while select.select([ours], [], [], 0.1)[0] or process.poll() is None:
            if select.select([ours], [], [], 0)[0]:
                said += os.read(ours, 65536)
    assert process.returncode == 0, said.decode(errors="replace")
    assert b"\x1b[?1049h" in said and b"\x1b[?1049l" in said  # a screen of its own, and back
    assert termios.tcgetattr(theirs)[3] == before[3]
    os.close(ours)
    os.close(theirs)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 60))
def test_a_curve_fits_and_its_highest_place_is_full(values: list[float], width: int) -> None:
    drawn = spark(values, width)
    assert len(drawn) == min(width, len(values))
    assert (BLOCKS[-1] in drawn) == (max(values) > 1e-9) or max(values) < 1e-6
    assert spark(values, width, top=1e9).strip(" ▁") == ""
