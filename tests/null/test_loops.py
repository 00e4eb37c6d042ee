"""Answers that repeat themselves: found exactly, told without changing a byte, ended where a row asks for it."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from echo_job import BLOCK, EchoJob, chat
from hypothesis import given
from hypothesis import strategies as st

from shoal.client import InProcess
from shoal.core.clock import SimClock
from shoal.core.errors import UsageError
from shoal.core.types import Request, Slice
from shoal.engine import Engine
from shoal.jobs.display import Progress, Rates, plain_line
from shoal.jobs.loops import LOOP, Rule, rule_of
from shoal.jobs.watches import Straggler
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.echo import EchoExecutor

ROOT = Path(__file__).resolve().parents[2]
Jobs = Callable[..., EchoJob]


def tokens(*values: int) -> array[int]:
    return array("i", values)


def slow_period(rule: Rule, text: array[int]) -> int:
    """The specification: a piece at the end that stands `times` over, and over at least `least` tokens."""
    for period in range(rule.shortest, rule.longest + 1):
        stretch = max(rule.times * period, rule.least)
        if len(text) >= stretch and all(text[-i] == text[-i - period] for i in range(1, stretch - period + 1)):
            return period
    return 0


RULES = st.builds(Rule, st.integers(1, 3), st.integers(1, 9), st.integers(2, 4), st.integers(0, 20))


@given(RULES, st.lists(st.integers(0, 2), max_size=12), st.integers(1, 8), st.lists(st.integers(0, 1), max_size=3))
def test_a_loop_is_what_the_words_say(rule: Rule, piece: list[int], times: int, rest: list[int]) -> None:
    text = tokens(*piece * times, *rest)
    assert rule.period(text) == slow_period(rule, text)


@given(RULES, st.lists(st.integers(0, 2), max_size=60), st.data())
def test_the_end_does_not_depend_on_how_the_tokens_come(rule: Rule, found: list[int], data: st.DataObject) -> None:
    text = tokens(*found)
    first = next((n for n in range(1, len(text) + 1) if slow_period(rule, text[:n])), -1)
    at = 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        end = rule.end(text[:at], text[at : at + size])
        if end >= 0:
            assert at + end == first
            return
        at += size
    assert first == -1


def test_a_text_of_chance_does_not_loop() -> None:
    """The control: 60,000 places in tokens drawn from two, three and fifty; chance says less than 10**-7 of one."""
    for letters in (2, 3, 50):
        luck = random.Random(letters)
        text = array("i", (luck.randrange(letters) for _ in range(20_000)))
        assert not any(LOOP.period(text[max(0, end - 400) : end]) for end in range(1, len(text)))


def test_texts_that_people_wrote_do_not_loop_and_the_same_with_a_loop_do() -> None:
    """The other control, words and letters of this project's own documents, tables and code among them."""
    places = 0
    for path in sorted((ROOT / "docs").glob("*.md")):
        words = path.read_text(encoding="utf-8").split()
        names = {word: number for number, word in enumerate(sorted(set(words)))}
        text = array("i", (names[word] for word in words))
        places += len(text)
        assert not any(LOOP.period(text[max(0, end - 400) : end]) for end in range(0, len(text), 3)), path
        assert LOOP.period(text[:200] + text[50:90] * 3) == 40
    assert places > 5_000


@pytest.mark.parametrize(
    ("period", "times", "found"), [(1, 64, 1), (1, 63, 0), (30, 3, 30), (128, 3, 128), (129, 3, 0)]
)
def test_how_much_it_takes(period: int, times: int, found: int) -> None:
    piece = tokens(*range(100, 100 + period))
    assert LOOP.period(tokens(1, 2, 3) + piece * times) == found


class Parrot(EchoExecutor):
    """Says the same piece of `period` tokens again and again, on every row whose prompt is longer than `least`."""

    period, least = 5, 40

    def _sample(self, part: Slice, at: int, request: Request) -> list[int]:
        if len(request.prompt) <= self.least:
            return super()._sample(part, at, request)
        produced = self.produced[part.ticket]
        produced.append(300 + len(produced) % self.period)
        return [produced[-1]]


def parrot(ahead: int = 1, sequences: int = 64) -> InProcess:
    clock = SimClock()
    scheduler = Scheduler(BatchPolicy(Budget(256, sequences)), 4096, BLOCK)
    return InProcess(Engine(scheduler, Parrot(4096, BLOCK, clock), clock, ahead))


LONG = "a question that is long enough to be repeated " * 3
ROWS = [chat(i, LONG * 2 if i % 4 == 0 else f"{i}", max_tokens=100, temperature=0, seed=i) for i in range(12)]


def test_loops_are_told_and_change_no_answer(job: Jobs) -> None:
    one = job([chat(i, f"{LONG * 2}{i}" if i % 4 == 0 else f"{i}", max_tokens=100) for i in range(12)])
    assert one.run(parrot()) == 0
    rows = [json.loads(line) for line in (one.state / "rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows if row.get("loop_period") == 5] == [1, 5, 9]
    assert sum("loop_period" in row for row in rows) == 3
    usage = [line["response"]["body"]["usage"]["completion_tokens"] for line in one.answers()]
    assert usage[::4] == [100] * 3
    assert "3 repeat themselves" in one.said


@pytest.mark.parametrize(("ahead", "sequences"), [(1, 64), (2, 3)])
def test_a_row_that_asks_is_ended_at_the_same_token_whatever_the_batch(job: Jobs, ahead: int, sequences: int) -> None:
    asked: dict[str, Any] = {"max_pattern_size": 8, "min_count": 3}
    rows = [
        chat(i, f"{LONG * 2}{i}", max_tokens=100, repetition_detection=asked, return_token_ids=True) for i in range(9)
    ]
    one = job(rows)
    assert one.run(parrot(ahead, sequences)) == 0
    for line in one.answers():
        choice = line["response"]["body"]["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")
        assert choice["token_ids"] == [300 + i % 5 for i in range(15)]
        assert line["response"]["body"]["usage"]["completion_tokens"] == 15
    assert one.report.rows.ok == 9


def test_a_row_with_the_field_is_another_question(job: Jobs) -> None:
    asked = {"max_pattern_size": 8, "min_count": 3}
    one = job([chat(1, LONG * 2, temperature=0, max_tokens=60), chat(2, LONG * 2, temperature=0, max_tokens=60,
                                                                     repetition_detection=asked)])  # fmt: skip
    assert one.run(parrot()) == 0 and one.report.reused.duplicates == 0
    assert [line["response"]["body"]["usage"]["completion_tokens"] for line in one.answers()] == [60, 15]


NONSENSE = [{"max_pattern_size": 3}, {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, {"min_count": 3}]


@pytest.mark.parametrize("asked", NONSENSE)
def test_a_rule_that_makes_no_sense_fails_its_row(job: Jobs, asked: dict[str, int]) -> None:
    one = job([chat(1), chat(2, repetition_detection=asked)])
    assert one.run() == 3 and one.codes() == ["invalid_request"]
    assert one.failures()[0]["response"]["body"]["error"]["param"] == "repetition_detection"


@pytest.mark.parametrize("asked", NONSENSE)
def test_for_all_rows_it_is_refused_before_any(job: Jobs, asked: dict[str, int]) -> None:
    one = job([chat(1)], body={"repetition_detection": asked})
    with pytest.raises(UsageError, match="repetition_detection"):
        one.run()
    assert not one.out.exists()


def test_answers_that_were_not_computed_are_told_to_repeat_themselves_too(job: Jobs, tmp_path: Path) -> None:
    asked = {"max_pattern_size": 8, "min_count": 3}
    rows = [chat(i, LONG * 2, max_tokens=100, temperature=0) for i in range(3)]
    rows += [chat(i, LONG * 3, max_tokens=100, temperature=0, repetition_detection=asked) for i in range(3, 5)]
    first, second = (job(rows, cache=tmp_path / "kept") for _ in range(2))
    for one in (first, second):
        assert one.run(parrot()) == 0 and one.report.looped == 5 and "5 repeat themselves" in one.said
        found = [json.loads(line)["loop_period"] for line in (one.state / "rows.jsonl").read_text().splitlines()]
        assert found == [5] * 5
    assert first.report.reused.duplicates == 3 and second.report.reused.cached > 0


def test_the_rule_is_made_a_few_times_for_a_row_not_for_each_token(job: Jobs) -> None:
    one = job([chat(1, LONG * 2, max_tokens=200, repetition_detection={"max_pattern_size": 8, "min_count": 90})])
    with mock.patch("shoal.jobs.schema.rule_of", wraps=rule_of) as made:
        assert one.run(parrot()) == 0
    assert 0 < made.call_count < 20


def test_a_straggler_is_named_with_what_it_costs() -> None:
    line = plain_line(Progress(10, 9, straggler=Straggler(812, 70.0, 40.0)), Rates())
    assert line.endswith("line 812 has run for 1 min 10 s, 40 s of it with nothing left to start")
