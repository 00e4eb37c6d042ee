"""A job over servers: each row is answered once, whatever the servers do, and whatever becomes of the job."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.core.errors import ShoalError, UsageError
from shoal.jobs.options import JobOptions
from shoal.remote.backend import Servers
from tests.null.bad_server import FAULTS, STALL, BadServer, answer_to, prompt_of, script_of_all, serving
from tests.null.echo_job import EchoJob, chat, completion, interrupt, job
from tests.null.echo_job import Watched as Looked

__all__ = ["job"]
ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-a-key-that-nobody-may-find"

Make = Callable[..., EchoJob]


def embedding(number: int, texts: Any) -> str:
    body = {"model": "any", "input": texts}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/embeddings", "body": body})


def mixed(number: int) -> list[str]:
    """Rows of all kinds, no two alike."""
    rows = []
    for i in range(number):
        kind = i % 4
        if kind == 0:
            rows.append(completion(i, f"Once there was a fish {i}", logprobs=2, made_up_field=[1, {"a": None}]))
        elif kind == 1:
            rows.append(embedding(i, [f"text {i}", f"longer text {i}", "x"]))
        else:
            rows.append(chat(i, f"Question {i}", n=1 + i % 3))
    return rows


def run(job: EchoJob, *servers: BadServer, **more: Any) -> int:
    """Run a job over these servers with little patience."""
    options = {name: more.pop(name) for name in ("stalled", "nobody", "tries", "life") if name in more}
    backend = Servers([server.url for server in servers], KEY, **{"stalled": 0.25, **options})
    try:
        return job.run(backend, device=",".join(server.url for server in servers), **more)
    finally:
        backend.close()


def check_answers(job: EchoJob, rows: list[str]) -> None:
    """Every row has its own answer, in its place, whole and in order."""
    answers = job.answers()
    assert [line["custom_id"] for line in answers] == [json.loads(row)["custom_id"] for row in rows]
    for row, line in zip(rows, answers, strict=True):
        asked, reply = json.loads(row)["body"], line["response"]["body"]
        if "input" in asked:
            assert [one["embedding"][0] for one in reply["data"]] == [len(text) for text in asked["input"]]
            continue
        texts = [one["text"] if "prompt" in asked else one["message"]["content"] for one in reply["choices"]]
        assert texts == [answer_to(prompt_of(asked), index) for index in range(asked.get("n", 1))]


def test_every_row_is_answered_once_whatever_the_server_does(job: Make) -> None:
    rows = mixed(80)
    this = job(rows)
    with serving(script_of_all) as server:
        assert run(this, server) == 0
        faults = {fault for prompt in server.answered for fault in script_of_all(prompt)}
        assert faults == set(FAULTS)
        assert set(server.answered.values()) == {1} and len(server.answered) == 80
        check_answers(this, rows)
        report = this.report
        assert report.rows.ok == 80 and not report.problems()
        assert report.sent.requests == len(server.asked) > 80
        assert report.sent.requests == 80 + report.sent.refused + report.sent.broken


def test_an_answer_that_is_ten_seconds_late_is_taken_once_or_not_at_all(job: Make) -> None:
    """The stalls are waited out. First the call is given up after 6 seconds, so that its answer comes too late; made
    again it has 12, and the answer is taken. The other rows come and go meanwhile."""
    rows = [chat(i, f"Question {i}") for i in range(12)]
    this = job(rows)
    with serving(lambda prompt: ["late"] * 2 if prompt.endswith((" 2", " 9")) else ()) as server:
        began = time.monotonic()
        assert run(this, server, stalled=6.0) == 0
        assert time.monotonic() - began > 6.0 + STALL
        assert {prompt for prompt, times in server.answered.items() if times == 2} == {"Question 2", "Question 9"}
        assert server.asked.count("Question 2") == 2 and len(server.asked) == 14
    check_answers(this, rows)
    assert this.report.rows.ok == 12 and this.report.sent.broken == 2 and not this.report.problems()


def test_a_job_that_is_interrupted_goes_on_and_no_row_is_answered_twice(job: Make) -> None:
    rows = mixed(40)
    this = job(rows)
    with serving(script_of_all) as server:
        for stop in (3, 2, 4):
            backend = Servers([server.url], stalled=0.25)
            code = this.run(Looked(backend, interrupt(stop)), device=server.url)
            backend.close()
            assert code in (0, 5)
        assert run(this, server) == 0
        check_answers(this, rows)


def test_a_job_that_is_killed_goes_on_and_no_row_is_lost_or_doubled(tmp_path: Path) -> None:
    rows = mixed(150)
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    out, kills, chance = tmp_path / "out.jsonl", 0, random.Random(1)
    slow = {"stall", "429", "503 later"}  # the server has refusals of its own
    with serving(lambda prompt: [one for one in script_of_all(prompt) if one not in slow], room=6) as server:
        server.seconds = 0.02
        command = [sys.executable, "-m", "shoal", "run", "-q", "-i", str(tmp_path / "in.jsonl"), "-o", str(out)]
        command += ["--endpoint", server.url]
        while kills < 3:
            before = len(server.answered)
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OPENAI_API_KEY": KEY})
            while process.poll() is None and len(server.answered) < before + chance.randrange(5, 40):
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert subprocess.run(command, cwd=ROOT, env={**os.environ, "OPENAI_API_KEY": KEY}).returncode == 0
        assert kills >= 2
        again = sum(count - 1 for count in server.answered.values())
    this = EchoJob(tmp_path, rows)
    check_answers(this, rows)
    assert this.report.rows.ok == 150 and not this.report.problems()
    # What was in flight, or answered in the half second before a commit, is asked for again, and no more.
    assert again <= kills * (6 + 40)
    for path in [out, *tmp_path.glob("out.jsonl.shoal/*")]:
        assert KEY.encode() not in path.read_bytes()


def test_the_key_goes_into_the_header_and_nowhere_else(job: Make) -> None:
    this = job([chat(i) for i in range(3)])
    with serving() as server:
        assert run(this, server) == 0
        assert {one["Authorization"] for one in server.headers} == {f"Bearer {KEY}"}
    kept = [path for path in this.root.rglob("*") if path.is_file()]
    assert len(kept) > 4 and not [path for path in kept if KEY.encode() in path.read_bytes()]
    assert KEY not in this.said


def test_bodies_are_passed_on_with_what_the_job_adds(job: Make) -> None:
    own = {"tools": [{"type": "function", "function": {"name": "f"}}], "unknown": 1.50, "timeout": 60}
    this = job([chat(1, "a", **own), chat(2, "b", top_k=7)], body={"top_k": 3, "later": {"x": 1}})
    with serving() as server:
        assert run(this, server) == 0
        first, second = sorted(server.bodies, key=lambda body: str(body["messages"]))
    added = {"top_k": 3, "later": {"x": 1}}
    assert first | {"timeout": 60} == json.loads(this.rows[0])["body"] | added and "timeout" not in first
    assert (second["top_k"], second["later"]) == (7, {"x": 1})


def test_rows_without_a_model_get_the_jobs(job: Make) -> None:
    bare = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    this = job([json.dumps(bare), completion(2, "y")], model="some/model")
    with serving() as server:
        assert run(this, server) == 0
        assert {body["prompt"]: body["model"] for body in server.bodies} == {"x": "some/model", "y": "any"}


def test_plain_rows_come_back_with_their_answers(job: Make) -> None:
    this = job(['{"text": "one", "k": 1}', '{"text": "two", "k": 2}', '{"k": 3}'], prompt="Say {text}", chat=True)
    with serving() as server:
        assert run(this, server) == 3
    assert this.codes() == ["missing_column"]
    assert this.answers()[0] == {
        "text": "one", "k": 1, "answer": answer_to("Say one"), "finish_reason": "stop", "prompt_tokens": 7,
        "completion_tokens": 3,
    }  # fmt: skip


def test_a_row_that_the_server_refuses_is_the_rows_fault_and_asked_once(job: Make) -> None:
    this = job([chat(i, f"Question {i}") for i in range(8)])
    with serving(lambda prompt: ["400"] * 99 if prompt.endswith("3") else ()) as server:
        assert run(this, server) == 3
        assert server.asked.count("Question 3") == 1
    (failed,) = this.failures()
    assert (
        this.codes() == ["context_length_exceeded"] and "as told: 400" in failed["response"]["body"]["error"]["message"]
    )
    assert (failed["x_shoal"]["fault"], failed["custom_id"]) == ("yours", "r3")


@pytest.mark.parametrize("fault, code", [("500", "server_error"), ("drop", "no_reply"), ("no json", "bad_reply")])
def test_a_row_that_fails_each_time_is_given_up_and_the_others_are_not(job: Make, fault: str, code: str) -> None:
    this = job([chat(i, f"Question {i}") for i in range(8)])
    bad = [fault] * 3
    with serving(lambda prompt: bad if prompt.endswith("3") else ()) as server:
        assert run(this, server, tries=3) == 3
        assert server.asked.count("Question 3") == 3
        assert this.codes() == [code] and this.failures()[0]["x_shoal"]["fault"] == "transient"
        assert len(this.answers()) == 7


def test_a_refused_key_ends_the_job_and_costs_no_row(job: Make) -> None:
    this = job([chat(i) for i in range(8)])
    with serving(lambda prompt: ["401"]) as server:
        with pytest.raises(ShoalError, match="OPENAI_API_KEY") as caught:
            run(this, server)
        assert caught.value.exit_code == 2 and not this.failures()
        server.script = lambda prompt: ()
        assert run(this, server) == 0 and len(this.answers()) == 8


def test_a_server_that_is_not_there_ends_the_job_and_costs_no_row(job: Make) -> None:
    this = job([chat(i) for i in range(8)])
    with serving() as server:
        gone = server.url
    backend = Servers([gone], nobody=0.3)
    with pytest.raises(ShoalError, match="no server answers at http://127.0.0.1"):
        this.run(backend, device=gone)
    backend.close()
    with serving() as server:  # at another address
        assert run(this, server) == 0 and len(this.answers()) == 8


def test_a_server_that_goes_away_leaves_its_rows_to_the_other(job: Make) -> None:
    rows = [chat(i, f"Question {i}") for i in range(200)]
    this = job(rows)
    with serving() as stays, serving() as goes:
        goes.script = lambda prompt: ["drop"] if len(goes.asked) > 20 else ()
        goes.seconds = stays.seconds = 0.005
        assert run(this, stays, goes) == 0
        assert len(stays.answered) > 100 and len(stays.answered | goes.answered) == 200
    check_answers(this, rows)


def test_equal_rows_that_are_settled_are_asked_once_and_others_each(job: Make) -> None:
    cold = [chat(i, "same", temperature=0) for i in range(5)]
    warm = [chat(10 + i, "same", temperature=1) for i in range(5)]
    this = job(cold + warm)
    with serving() as server:
        assert run(this, server) == 0
        assert len(server.asked) == 6
    check_answers(this, cold + warm)
    assert this.report.reused.duplicates == 4 and this.report.tokens.output == 30


def test_the_cache_answers_a_later_job_over_the_same_servers(job: Make, tmp_path: Path) -> None:
    rows = [chat(i, f"Q {i}", temperature=0) for i in range(6)] + [chat(9, "drawn", temperature=1)]
    with serving() as server:
        first, second = job(rows), job(rows)
        assert run(first, server, cache=tmp_path / "cache") == 0
        assert run(second, server, cache=tmp_path / "cache") == 0
        assert len(server.asked) == 8
        assert second.report.reused.cached == 6 and second.report.reused.prompt_tokens == 6 * 3
    assert first.answers()[:6] == second.answers()[:6]


def test_nothing_is_kept_for_later_jobs_of_a_model_without_a_name(job: Make, tmp_path: Path) -> None:
    bare = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": 0}}
    rows = [json.dumps(bare), json.dumps(bare | {"custom_id": "b"})]
    with serving() as server:
        for asked in (1, 2):  # one for the two rows of a job, and again for the next
            assert run(job(rows), server, cache=tmp_path / "cache") == 0
            assert len(server.asked) == asked
        for _ in range(2):
            assert run(job(rows), server, cache=tmp_path / "cache", model="named") == 0
        assert len(server.asked) == 3


def test_rows_that_share_a_beginning_are_sent_one_after_the_other(job: Make) -> None:
    texts = ["".join(chr(97 + family) * 200) + f" question {i}" for i in range(8) for family in range(5)]
    this = job([chat(i, text) for i, text in enumerate(texts)])
    with serving(room=1) as server:
        assert run(this, server) == 0
        served = [text[0] for text in server.asked]
    changes = sum(one != other for one, other in zip(served, served[1:], strict=False))
    assert changes < 12, served  # in file order they would be 39


def test_a_row_whose_time_is_up_fails_and_its_call_is_broken_off(job: Make) -> None:
    this = job([chat(1, "slow", timeout=0.3), chat(2, "quick")])
    with serving(lambda prompt: ["stall"] * 9 if prompt == "slow" else ()) as server:
        assert run(this, server, stalled=5.0) == 3
    assert this.codes() == ["row_timeout"] and len(this.answers()) == 1


def test_the_limit_that_a_server_has_is_found_and_kept(job: Make) -> None:
    this = job([chat(i, f"Question {i}") for i in range(300)])
    with serving(room=12) as server:
        server.seconds = 0.02
        assert run(this, server) == 0
        assert server.refused < 60, server.refused
    assert len(this.answers()) == 300


def test_what_only_an_engine_of_ours_can_be_told_is_refused() -> None:
    place = {"input": Path("a"), "output": Path("b"), "device": "http://localhost:1/v1"}
    assert JobOptions(**place).endpoints == ("http://localhost:1/v1",)
    for name, value in {"memory": 1, "weights": "int8", "verify": 0.1, "seed": 3, "adapter": {"a": "b"}}.items():
        with pytest.raises(UsageError, match="--endpoint"):
            JobOptions(**place, **{name: value})


def test_it_ends_though_something_happens_at_the_moment_of_closing() -> None:
    backend = Servers(["http://127.0.0.1:9/v1"])
    loop = backend._loop
    time.sleep(0.1)  # it waits for something to happen

    def happen() -> None:
        backend._wake.set()
        loop.call_soon(loop.stop)  # as close() does: now the thread that sends has been woken, and has not run

    loop.call_soon_threadsafe(happen)
    backend._thread.join(10)
    assert not backend._thread.is_alive()


@pytest.mark.parametrize("value", ["1e400", "-1e999", "9" * 5000, '"\\ud800"'])
def test_a_value_that_cannot_be_read_fails_its_line_alone(job: Make, value: str) -> None:
    rows = [chat(i, f"Question {i}", temperature=0) for i in range(4)]
    rows[2] = rows[2].replace('"temperature": 0', f'"temperature": {value}')
    this = job(rows)
    with serving() as server:
        assert run(this, server) == 3
    assert len(this.answers()) == 3 and len(this.codes()) == 1 and this.failures()[0]["x_shoal"]["fault"] == "yours"


def test_rows_that_differ_in_anything_but_who_asks_are_not_equal(job: Make) -> None:
    same = [chat(i, "same", temperature=0, **more) for i, more in enumerate([{}, {"user": "a"}, {"priority": 3}])]
    other = [{"length_penalty": 2.0}, {"early_stopping": True}, {"include_reasoning": False}, {"made_up": 1}]
    this = job(same + [chat(9 + i, "same", temperature=0, **more) for i, more in enumerate(other)])
    with serving() as server:
        assert run(this, server) == 0
        assert len(server.asked) == 1 + len(other)


@pytest.mark.parametrize("key", ["\u201csk-quoted\u201d", "sk-one\nsk-two", "sk-\x7f"])
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        Servers(["http://127.0.0.1:9/v1"], key)
    assert "sk-" not in str(caught.value)


def test_a_key_may_come_with_its_end_of_line(job: Make) -> None:
    this = job([chat(1)])
    with serving() as server:
        backend = Servers([server.url], f" {KEY}\r\n")
        assert this.run(backend, device=server.url) == 0
        backend.close()
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks5://127.0.0.1:1"), ("ALL_PROXY", "nonsense://x"),
    ("SSL_CERT_FILE", "/no/such/file"),
])  # fmt: skip
def test_an_environment_that_allows_no_connection_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name):
        Servers(["http://127.0.0.1:9/v1"]).close()


def test_a_thread_that_ends_by_itself_is_no_wait_for_ever() -> None:
    backend = Servers(["http://127.0.0.1:9/v1"])
    backend._loop.call_soon_threadsafe(backend._loop.stop)
    backend._thread.join(10)
    with pytest.raises(ShoalError, match="thread"):
        backend.outputs(0.1)
    backend.close()
