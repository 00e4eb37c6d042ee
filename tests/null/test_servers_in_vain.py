"""Calls that come to nothing: whose fault it is, how long they are made again, and what becomes of the others."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.core.errors import ShoalError
from shoal.core.types import Finish
from shoal.jobs.blamed import NOTE
from shoal.jobs.options import Order
from shoal.jobs.passing_encode import as_tokens
from shoal.remote import backend as module
from shoal.remote import tries
from shoal.remote.backend import Servers
from shoal.remote.server import LONGEST_PAUSE, Server
from shoal.remote.words import Call, Reply
from tests.null.bad_server import BadServer, answer_to, serving
from tests.null.echo_job import EchoJob, chat, job
from tests.null.echo_job import Watched as Looked

__all__ = ["job"]
Make = Callable[..., EchoJob]
EVER = 10_000  # times


def call(text: str) -> Call:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": text}]})
    return Call(text, as_tokens(text), index=0, url="/v1/chat/completions", body=body)


@contextmanager
def asking(*servers: BadServer, **more: Any) -> Iterator[Servers]:
    backend = Servers([server.url for server in servers], **more)
    try:
        yield backend
    finally:
        backend.close()


def ends(backend: Servers, texts: Iterable[str], seconds: float = 20.0) -> dict[str, Reply]:
    """What becomes of these calls."""
    calls = [call(text) for text in texts]
    backend.submit(calls)
    found: dict[str, Reply] = {}
    until = time.monotonic() + seconds
    while len(found) < len(calls):
        assert time.monotonic() < until, f"{len(found)} of {len(calls)} have ended"
        news = backend.outputs(0.1)
        found |= {one.id: one for one in (news.outputs if news else ()) if isinstance(one, Reply)}
    return found


def codes(found: dict[str, Reply]) -> dict[str, str]:
    return {text: reply.code for text, reply in found.items() if reply.finish is Finish.ERROR}


QUESTIONS = [f"Question {i}" for i in range(30)]


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_call_that_is_always_refused_keeps_nobody_from_an_answer_and_is_given_up(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tries, "REFUSALS", 3)
    large = {"Question 0", "Question 7"}
    with serving(lambda prompt: [fault] * EVER if prompt in large else ()) as server, asking(server) as backend:
        found = ends(backend, QUESTIONS)
        assert codes(found) == dict.fromkeys(large, "server_error")
        assert set(server.answered) == set(QUESTIONS) - large
        assert max(server.asked.count(prompt) for prompt in large) <= 12


def test_a_full_server_costs_no_call_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "REFUSALS", 3)
    with serving(room=2) as server, asking(server) as backend:
        server.seconds = 0.005
        assert not codes(ends(backend, [f"Question {i}" for i in range(150)])) and server.refused > 0


def test_a_server_that_refuses_for_ever_ends_the_job_with_a_warning_before(
    job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE", 1.0)
    monkeypatch.setattr(module, "LONG_WAIT", 0.2)
    this = job([chat(i, f"Question {i}") for i in range(20)])
    with serving(lambda prompt: ["429"] * EVER) as server, asking(server) as backend:
        with pytest.raises(ShoalError, match="no server answers .* slow down"):
            this.run(backend, device=server.url, quiet=False)
        assert len(server.asked) < 40
        assert "nothing was answered" in this.said and not this.failures()
        server.script = lambda prompt: ()
    with serving() as server, asking(server) as backend:
        assert this.run(backend, device=server.url) == 0


@pytest.mark.parametrize("fault", ["drop", "502", "504"])
def test_a_server_that_comes_up_behind_what_forwards_to_it_costs_no_call_a_try(fault: str) -> None:
    ready = time.monotonic() + 1.5
    down = [fault] * EVER
    with serving(lambda prompt: down if time.monotonic() < ready else ()) as server:
        with asking(server, tries=2, nobody=1.0) as backend:
            assert not codes(ends(backend, QUESTIONS))
            assert len(server.asked) < 150


@pytest.mark.parametrize("fault", ["drop", "502"])
def test_a_server_that_restarts_costs_no_call_its_row(fault: str) -> None:
    down: list[str] = []
    with serving(lambda prompt: down) as server, asking(server, tries=2) as backend:
        assert not codes(ends(backend, QUESTIONS[:10]))
        back = time.monotonic() + 1.5
        server.script = lambda prompt: [fault] * EVER if time.monotonic() < back else ()
        assert not codes(ends(backend, QUESTIONS[10:]))


@pytest.mark.parametrize("fault", ["429", "drop"])
def test_a_killed_job_that_has_only_such_rows_left_ends_with_their_failures(
    job: Make, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it knew of them is known when it goes on: the server answers nothing any more that could tell again."""
    monkeypatch.setattr(module, "GONE", 1.0)
    with serving(lambda prompt: [fault] * EVER if prompt.endswith((" 3", " 7")) else ()) as server:
        for _ in range(8):  # on a slow machine all others may be answered before the two are asked often enough
            this = job([chat(i, f"Question {i}") for i in range(20)], order=Order.FINISH)
            with asking(server) as backend:
                assert this.run(Looked(backend, all_but(this, 18)), device=server.url) == 5
            assert len(this.answers()) == 18 and not this.failures()
            assert not this.report.finished
            if blamed_in(this) == 2:
                break
        assert blamed_in(this) == 2
        with asking(server, nobody=1.0) as backend:
            assert this.run(backend, device=server.url) == 3
        asked = len(server.asked)
        with asking(server) as backend:
            assert this.run(backend, device=server.url) == 3
        assert len(server.asked) == asked, "it has ended once"
    assert set(this.codes()) == {"server_error" if fault == "429" else "no_reply"} and len(this.answers()) == 18


def blamed_in(this: EchoJob) -> int:
    """Of how many calls a job's journal knows that they failed while others were answered."""
    with closing(sqlite3.connect(this.state / "journal.db")) as database:
        found = database.execute("SELECT value FROM meta WHERE name = ?", (NOTE,)).fetchone()
    return 0 if found is None else len(json.loads(found[0]))


def all_but(this: EchoJob, answered: int) -> Callable[[int], None]:
    """Interrupt a job a while after so many rows were answered."""
    since: list[float] = []

    def look(rounds: int) -> None:
        if this.out.exists() and len(this.answers()) == answered:
            since.append(time.monotonic())
            if since[-1] - since[0] > 0.7:
                since[:] = [float("inf")]
                signal.raise_signal(signal.SIGINT)

    return look


def test_a_server_that_is_behind_nothing_ends_the_job_and_costs_no_row(
    job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE", 1.0)
    this = job([chat(i, f"Question {i}") for i in range(20)])
    with serving(lambda prompt: ["502"] * EVER) as server, asking(server, tries=2) as backend:
        with pytest.raises(ShoalError, match="no server answers .*502"):
            this.run(backend, device=server.url)
    assert not this.failures()


def test_a_call_that_ends_the_server_each_time_is_found_and_the_others_are_not_blamed() -> None:
    """For a while after each such call nothing is there."""
    gone = [0.0]

    def script(prompt: str) -> list[str]:
        if prompt == "Question 4":
            gone[0] = time.monotonic() + 0.2
        return ["drop"] * EVER if time.monotonic() < gone[0] else []

    with serving(script) as server, asking(server, tries=3) as backend:
        assert codes(ends(backend, QUESTIONS, 30.0)) == {"Question 4": "no_reply"}


def test_a_complaint_says_nothing_about_how_long_answers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_STALL", 0.1)
    with serving(lambda prompt: ["400"] if prompt == "bad" else ()) as server, asking(server, tries=2) as backend:
        assert len(codes(ends(backend, ["bad"]))) == 1
        server.seconds = 1.0
        assert not codes(ends(backend, ["slow 1", "slow 2"]))
        assert len(server.asked) == 3


def test_a_slow_answer_has_twice_as_long_at_each_try() -> None:
    with serving() as server, asking(server, stalled=0.2, tries=4) as backend:
        server.seconds = 0.7
        found = ends(backend, ["slow"])
        assert (
            not codes(found)
            and answer_to("slow")
            in msgspec.json.decode(found["slow"].body.encode())["choices"][0]["message"]["content"]
        )


def test_no_limit_cuts_answers_that_are_known_to_take_long() -> None:
    with serving() as server, asking(server) as backend:
        unknown = [backend._stall(tries) for tries in range(6)]
        assert unknown[:3] == [600.0, 1200.0, 2400.0] and unknown[-1] == 3600.0
        backend._longest = 1000.0
        assert min(backend._stall(tries) for tries in range(6)) == 8000.0


def test_a_row_has_its_time_while_it_is_under_way_and_not_while_it_waits(job: Make) -> None:
    ready = time.monotonic() + 1.5
    this = job([chat(1, "one", timeout=0.6), chat(2, "two")])
    with serving(lambda prompt: ["429"] * EVER if time.monotonic() < ready else ()) as server:
        with asking(server) as backend:
            assert this.run(backend, device=server.url) == 0
    assert len(this.answers()) == 2 and time.monotonic() > ready


def test_a_call_that_is_broken_off_leaves_no_text(job: Make) -> None:
    this = job([chat(1, "slow", timeout=0.3), chat(2, "quick")])
    with serving(lambda prompt: ["stall"] if prompt == "slow" else ()) as server, asking(server) as backend:
        assert this.run(backend, device=server.url) == 3
    (failed,) = this.failures()
    assert this.codes() == ["row_timeout"] and "answers" not in str(failed) and "''" not in str(failed)


@pytest.mark.parametrize("fault", ["403", "404"])
def test_one_forbidden_row_fails_alone_though_it_goes_first(job: Make, fault: str, tmp_path: Path) -> None:
    this = job([chat(i, f"Question {i}") for i in range(12)])
    refused = "Question 0"
    with serving(lambda prompt: [fault] * EVER if prompt == refused else ()) as server, asking(server) as backend:
        server.plain = True
        assert this.run(backend, device=server.url) == 3
    assert len(this.answers()) == 11 and this.failures()[0]["x_shoal"]["fault"] == "yours"


@pytest.mark.parametrize("fault", ["403", "404"])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_wrong_key_or_address_ends_the_job_soon_and_costs_no_row(job: Make, fault: str, rows: int) -> None:
    this = job([chat(i, f"Question {i}") for i in range(rows)])
    with serving(lambda prompt: [fault] * EVER) as server, asking(server) as backend:
        server.plain = True
        with pytest.raises(ShoalError, match="OPENAI_API_KEY|--endpoint") as caught:
            this.run(backend, device=server.url)
        assert caught.value.exit_code == 2 and not this.failures() and len(server.asked) <= 24


def test_a_server_that_ignores_n_is_asked_twice_and_no_more(job: Make) -> None:
    this = job([chat(1, "many", n=3), chat(2, "one")])
    with serving(lambda prompt: ["few"] * EVER if prompt == "many" else ()) as server, asking(server) as backend:
        assert this.run(backend, device=server.url) == 3
        assert server.asked.count("many") == 2
    assert this.codes() == ["not_supported"] and "ignores n" in str(this.failures())


@pytest.mark.parametrize("asked", [None, 0.0, 0.01, 1.0])
def test_pauses_grow_whatever_the_server_asks_for(asked: float | None) -> None:
    server, now, waits = Server("http://a/v1"), 10.0, []
    for _ in range(14):
        server.in_vain(now, asked, "why")
        server.in_vain(now, asked, "why")  # at the same time by another call
        waits.append(round(server.wait(now), 6))
        now += waits[-1] + 1e-6
    assert waits == sorted(waits) and waits[-1] == pytest.approx(LONGEST_PAUSE)
    assert server.vain_since is not None and now - server.vain_since > 100.0


def test_a_pause_that_is_asked_for_is_no_silence() -> None:
    server = Server("http://a/v1")
    server.in_vain(10.0, 3600.0, "come back in an hour")
    assert server.wait(10.0) == pytest.approx(3600.0)
    assert server.vain_since is not None and 3610.0 - server.vain_since < 1.0


@pytest.mark.parametrize("fault", ["later", "500 later"])
def test_the_user_is_told_of_a_long_pause_once(fault: str) -> None:
    with serving(lambda prompt: [fault] * EVER) as server, asking(server) as backend:
        backend.submit([call(text) for text in QUESTIONS[:4]])
        said: list[str] = []
        until = time.monotonic() + 1.0
        while time.monotonic() < until or not said:
            news = backend.outputs(0.1)
            said += news.warnings if news else ()
    (words,) = said
    assert "asks for a pause of 3600 s" in words and len(server.asked) == 4
