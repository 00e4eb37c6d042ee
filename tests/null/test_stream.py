"""Rows in, results out: those of a job over the same rows, each once, in bounded memory, ended when the caller is."""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from echo_job import ROWS, EchoJob, Mortal, Watched, chat, completion, echo_backend

import shoal
from shoal.core.errors import RowError, UsageError
from shoal.jobs.engines import Engines
from shoal.jobs.stream import Counts, Result, stream

Jobs = Callable[..., EchoJob]
MIXED = [  # written as a stream writes them: ids are hashes of a row's text
    msgspec.json.encode(json.loads(row)).decode()
    for row in [
        *ROWS[:40],
        completion(100, ["one", "two", "three"], n=2, logprobs=2),
        chat(101, "the same", temperature=0),
        chat(102, "the same", temperature=0),
        chat(103, stop=["a"]),
        json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}),
        chat(104, no_such_field=1),
        *ROWS[40:80],
    ]
]


def results(rows: Any, **options: Any) -> list[Result]:
    how = {name: options.pop(name) for name in ("window", "on_result", "on_progress") if name in options}
    return list(stream(rows, options, backend=echo_backend(), **how))


@pytest.mark.parametrize("window", [1, 3, 64, 1024])
def test_results_are_the_lines_of_a_job_each_once(job: Jobs, window: int) -> None:
    one = job(MIXED)
    one.run()
    found = sorted(results(map(json.loads, MIXED), window=window), key=lambda result: result.number)
    assert [result.number for result in found] == list(range(1, len(MIXED) + 1))
    assert [result.line for result in found if result.ok] == one.answers()
    assert [result.line for result in found if not result.ok] == one.failures()
    assert [result.row for result in found] == [json.loads(row) for row in MIXED]


def test_plain_rows_and_texts_too(job: Jobs) -> None:
    rows = [{"name": f"name {i}", "size": i} for i in range(30)]
    options = {"prompt": "Who is {name}?", "body": {"max_tokens": 4}}
    one = job([msgspec.json.encode(row).decode() for row in rows], **options)
    one.run()
    found = sorted(results(rows, **options), key=lambda result: result.number)
    assert [result.line for result in found] == one.answers()
    assert [result.text for result in found] == [line["answer"] for line in one.answers()]
    texts = [f"Who is name {i}?" for i in range(30)]
    again = sorted(results(texts, body={"max_tokens": 4, "temperature": 0}), key=lambda result: result.number)
    assert [len(result.texts) for result in again] == [1] * 30 and again[3].row == texts[3]
    chats = results(texts, chat=True, body={"max_tokens": 4})
    assert all(result.ok for result in chats) and "answer" in chats[0].line


def test_what_cannot_be_a_row_fails_alone() -> None:
    rows: list[object] = ["fine", 7, {"prompt": object()}, ["no"], "fine too"]
    found = sorted(results(rows, chat=True, body={"max_tokens": 4}), key=lambda result: result.number)
    assert [result.ok for result in found] == [True, False, False, False, True]
    assert [result.line["response"]["body"]["error"]["code"] for result in found[1:4]] == ["malformed_row"] * 3
    with pytest.raises(RowError, match="a row is a dict or a text"):
        found[1].text  # noqa: B018


def test_rows_are_taken_when_there_is_room_and_nothing_is_kept_of_those_that_are_over() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"Question {taken}"

    with stream(endless(), {"chat": True, "body": {"max_tokens": 3}}, window=40, backend=echo_backend()) as under_way:
        for number, result in enumerate(under_way, 1):
            counts = under_way.counts
            assert taken - number <= 40 and counts.under_way <= 40
            assert counts.taken == counts.answered + counts.failed + counts.under_way
            assert result.ok
            if number == 500:
                break
        work = under_way._work
        assert len(work._open) <= 40 and len(work._open._raws) == len(work._open) and len(work._feed._rows) <= 40
        before = taken
    assert taken == before and next(under_way, None) is None, "closed: no row is taken any more"


def test_a_row_may_be_made_of_the_result_before_it() -> None:
    """So each row is run, and its result handed on, while the next is waited for."""
    results: queue.SimpleQueue[Result] = queue.SimpleQueue()

    def conversation() -> Iterator[str]:
        yield "Question 0"
        for _ in range(4):
            yield f"And {results.get(timeout=20).text}"

    found = list(
        stream(conversation(), {"chat": True, "body": {"max_tokens": 3}}, 64, results.put, None, echo_backend())
    )
    assert [result.number for result in found] == [1, 2, 3, 4, 5]
    assert [result.row for result in found[1:]] == [f"And {result.text}" for result in found[:-1]]


def test_results_do_not_wait_for_a_row_that_never_comes() -> None:
    never = threading.Event()

    def slow() -> Iterator[str]:
        yield from ("Question 1", "Question 2")
        never.wait(60)

    with stream(slow(), {"chat": True, "body": {"max_tokens": 3}}, backend=echo_backend()) as under_way:
        assert {next(under_way).number, next(under_way).number} == {1, 2}
    never.set()


def test_rows_that_begin_alike_run_together() -> None:
    backend = Watched(echo_backend(), lambda rounds: None)
    rows = [f"{'abc'[number % 3] * 50} {number}" for number in range(30)]
    list(stream(rows, {"body": {"max_tokens": 2}}, backend=backend))
    starts = [bytes(request.prompt[:8]) for request in backend.submitted]
    assert starts == sorted(starts, key=starts.index) and len(set(starts)) == 3


def test_callers_are_called() -> None:
    told: list[Result] = []
    counts: list[Counts] = []
    found = results([f"Question {i}" for i in range(9)], on_result=told.append, on_progress=counts.append)
    assert told == found and counts[-1].answered == 9 and counts[-1].under_way == 0
    assert "9 rows answered" in str(counts[-1])


class Process(Mortal):
    """An engine that says whether it was ended."""

    closed = 0

    def close(self) -> None:
        type(self).closed += 1


def test_closing_ends_the_engine_and_so_does_an_error_in_the_rows() -> None:
    def breaks() -> Iterator[str]:
        yield from (f"Question {i}" for i in range(3))
        raise KeyError("mine")

    with mock.patch("shoal.jobs.engines.EngineProcess", Process):
        Process.made = Process.closed = 0
        one = shoal.run((f"Question {i}" for i in range(10**9)), chat=True, body={"max_tokens": 3}, window=32)
        assert Process.made == 0, "nothing is begun before a result is wanted"
        assert next(one).ok and (Process.made, Process.closed) == (1, 0)
        one.close()
        one.close()
        assert (Process.made, Process.closed) == (1, 1)
        with pytest.raises(KeyError, match="mine"):
            list(shoal.run(breaks(), chat=True))
        assert (Process.made, Process.closed) == (2, 2)
        abandoned = shoal.run((f"Question {i}" for i in range(100)), chat=True, body={"max_tokens": 3})
        next(abandoned)
        del abandoned
        assert (Process.made, Process.closed) == (3, 3)


class Dies(Mortal):
    """The first dies in its third round; any dies of row 5."""

    def dies(self, running: set[int]) -> bool:
        return (self.number == 1 and self.rounds == 3) or 5 in running


def test_rows_of_an_engine_that_dies_are_answered_once_by_the_next() -> None:
    rows = [f"Question {i}" for i in range(60)]
    whole = {result.number: result.line for result in results(rows, chat=True, body={"max_tokens": 6})}
    with (
        mock.patch("shoal.jobs.engines.EngineProcess", Dies),
        mock.patch.object(Engines, "wait", lambda self, seconds, meanwhile: None),
    ):
        Dies.made = 0
        found = list(stream(rows, {"chat": True, "body": {"max_tokens": 6}}, window=64))
    assert Dies.made > 2
    assert max(Counter(result.number for result in found).values()) == 1 and len(found) == 60
    failed = [result for result in found if not result.ok]
    assert [(one.number, one.line["response"]["body"]["error"]["code"]) for one in failed] == [(5, "engine_died")]
    assert all(whole[result.number] == result.line for result in found if result.ok)


def test_what_a_cache_knows_is_not_computed(tmp_path: Path) -> None:
    rows = [json.loads(chat(i, temperature=0, n=2)) for i in range(20)]
    first = {result.number: result.line for result in results(rows, cache=tmp_path / "cache")}
    backend = Watched(echo_backend(), lambda rounds: None)
    rows.append(json.loads(chat(20, temperature=0)))
    again = list(stream(rows, {"cache": tmp_path / "cache"}, backend=backend))
    assert len(backend.submitted) == 1 and len(again) == 21
    assert all(first[result.number] == result.line for result in again if result.number < 21)


def test_what_only_files_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="restart is nothing"):
        shoal.run(["a"], restart=True)
    with pytest.raises(UsageError, match="take the results"):
        shoal.run(["a"], "out.jsonl")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="must be in a file"):
        shoal.run(["a"], device="http://localhost:8000/v1")
    for name in ("window", "on_result", "on_progress"):
        with pytest.raises(UsageError, match=f"{name} is for rows that are in no file"):
            shoal.run("in.jsonl", "out.jsonl", **{name: print})  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="need a file"):
        shoal.run("in.jsonl")
    with pytest.raises(UsageError, match="window is 0"):
        shoal.run(["a"], window=0)
