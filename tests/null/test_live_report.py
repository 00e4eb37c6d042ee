"""`shoal report` says the same of a job whenever it is asked: while it runs, when it was killed, when it has ended."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from echo_job import ROWS, EchoJob, Watched, chat, echo_backend, interrupt
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call
from test_loops import LONG, parrot
from test_retry import BAD
from whole_job import SteppingClock

from shoal.client import News
from shoal.core.errors import StateError
from shoal.jobs.look import View
from shoal.jobs.report import Again, Report, Rows, Slow, Tokens
from shoal.jobs.report_words import again_line, facts
from shoal.jobs.tally import look_report, tally

Jobs = Callable[..., EchoJob]
MIXED = [*ROWS[:60], BAD, *(chat(i, "word " * 40 + f"{i % 9}", temperature=0) for i in range(200, 260))]


def meta(one: EchoJob, statement: str) -> None:
    with closing(sqlite3.connect(one.state / "journal.db")) as database:
        database.execute(statement)
        database.commit()


@pytest.mark.parametrize("blocks", [4096, 24])
def test_from_the_journal_a_finished_job_s_report_is_its_report(job: Jobs, blocks: int) -> None:
    one = job([*MIXED[:-20], *(chat(i, f"{i}", max_tokens=100 + i, ignore_eos=i % 2 > 0) for i in range(20))])
    assert one.run(echo_backend(blocks)) == 3
    assert look_report(one.out) == one.report
    assert one.report.problems() == [] and one.report.rows.total == 121
    again, tokens = one.report.again, one.report.tokens
    assert again.preempted + again.other == tokens.prompt_recomputed and again.restarted == 0


def test_with_a_cache_too(job: Jobs, tmp_path: Path) -> None:
    first, one = job(MIXED, cache=tmp_path / "kept"), job(MIXED[30:] + ROWS[60:90], cache=tmp_path / "kept")
    first.run()
    one.run()
    found = look_report(one.out)
    assert found == one.report and found.problems() == []
    assert found.reused.cached == 39 and 0 < found.reused.cached_prompt_tokens < found.reused.prompt_tokens


def test_while_it_runs_counts_add_up_and_rows_left_are_said(job: Jobs) -> None:
    one, seen = job(MIXED), list[Report]()
    with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), lambda rounds: seen.append(look_report(one.out))))
    assert all(report.problems() == [] and report.running and not report.finished for report in seen)
    ended = [report.rows.ended for report in seen]
    assert ended == sorted(ended) and ended[0] < ended[-1] < 121
    assert all(dict(facts(report))["rows"].startswith("121 rows") for report in seen)
    assert not look_report(one.out).running


@pytest.mark.parametrize("pace", [0.02, 0.04, 0.06])
def test_the_first_rows_that_are_kept_have_cost_something(
    job: Jobs, monkeypatch: pytest.MonkeyPatch, pace: float
) -> None:
    """Also when the job is killed soon after, and when its engine's first step takes a while."""

    class PacedClock(SteppingClock):
        def now(self) -> float:
            self._now += pace
            return self._now

    class LateBackend(Watched):
        def outputs(self, timeout: float) -> News | None:
            return super().outputs(timeout) if self.submitted and next(polls) else None

    def look(rounds: int) -> None:
        seen.append(look_report(one.out))
        if seen[-1].rows.ok:
            raise KeyboardInterrupt

    one, seen, polls = job([chat(i, max_tokens=2) for i in range(60)]), list[Report](), count()
    monkeypatch.setattr("shoal.jobs.run.WallClock", PacedClock)
    with pytest.raises(KeyboardInterrupt):
        one.run(LateBackend(echo_backend(tokens=64, sequences=4), look))
    assert seen[-1].tokens.prompt_computed > 0 and seen[-1].steps > 0


def test_of_a_job_that_was_killed_it_says_how_to_go_on(job: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(MIXED)
    with pytest.raises(KeyboardInterrupt), mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(30)))
    assert not (one.state / "report.json").exists()
    found = look_report(one.out)
    assert not found.running and not found.finished and 0 < found.rows.ended < 121 and found.problems() == []
    assert call("report", str(one.state)) == 0
    assert "has not finished: run the same command again" in capsys.readouterr().out
    assert call("report", str(one.out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["total"] == 121
    assert one.run() == 3 and look_report(one.out) == one.report


def test_after_an_interruption_what_is_computed_again_says_so(job: Jobs) -> None:
    one = job([chat(i, LONG * 20 + f"{i}", max_tokens=40) for i in range(40)])
    assert one.run(Watched(echo_backend(), interrupt(12))) == 5
    assert one.run() == 0
    assert one.report.again.restarted > 0 and one.report.again.other == 0
    assert "after an interruption" in again_line(one.report.again)


def test_counts_that_do_not_add_up_are_loud(job: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(MIXED)
    one.run()
    meta(one, "DELETE FROM results WHERE line IN (2, 5)")
    assert call("report", str(one.out)) == 1
    said = capsys.readouterr().out
    assert "DO NOT ADD UP" in said and "report.json counts" in said.replace("\n", " ")


@pytest.mark.parametrize("at", ["stats", "meta", "close"])
def test_a_job_that_ends_while_its_rows_are_counted_is_reported_as_ended(
    job: Jobs, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    one, really = job(MIXED), getattr(View, at)
    with pytest.raises(KeyboardInterrupt):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(30)))

    def ends(view: View, *given: Any) -> Any:
        found = really(view, *given)
        if at == "stats":
            found = iter(list(found))
        monkeypatch.undo()
        assert one.run() == 3
        return found

    monkeypatch.setattr(View, at, ends)
    found = look_report(one.out)
    assert found.problems() == [] and found == one.report


def test_an_old_journal_is_read_by_its_report_or_refused_in_words(job: Jobs) -> None:
    one = job(MIXED)
    one.run()
    meta(one, "DELETE FROM meta WHERE name='facts'")
    assert look_report(one.out) == one.report
    (one.state / "report.json").unlink()
    with pytest.raises(StateError, match="an earlier version of shoal began this job"):
        look_report(one.out)
    meta(one, "PRAGMA user_version=7")
    with pytest.raises(StateError, match="another version of shoal"):
        look_report(one.out)


def test_the_slowest_rows_are_named_with_what_took_long(job: Jobs) -> None:
    rows = [chat(i, max_tokens=4) for i in range(30)]
    rows[7] = chat(7, "a long one", max_tokens=900, ignore_eos=True)
    rows[11] = chat(11, LONG * 2, max_tokens=700)
    one = job(rows)
    assert one.run(parrot()) == 0
    first, second = one.report.slowest[:2]
    assert (first.line, second.line) == (8, 12) and len(one.report.slowest) == 5
    assert first.why == "its answer of 900 tokens" and 0 <= first.queue < 60
    assert second.why == "it repeats a piece of 5 tokens, for 700 tokens" and one.report.looped == 1
    assert any(name == "slow: line 8" for name, _ in facts(one.report))


REASONS = [
    (Slow(1, preemptions=2, loop_period=3), "put off 2 times"),
    (Slow(1, prefill=3.0, decode=1.0, prompt_tokens=900), "its prompt of 900 tokens"),
]


@pytest.mark.parametrize(("row", "why"), REASONS)
def test_why_a_row_was_slow(row: Slow, why: str) -> None:
    assert row.why.startswith(why)


@given(st.lists(st.tuples(st.sampled_from(["ok", "failed", "expired", "cancelled"]), st.booleans()), max_size=30))
def test_a_tally_counts_every_row_once(rows: list[tuple[str, bool]]) -> None:
    known = Report(Rows(total=len(rows)), Tokens(1000, 400), finished=False)
    stats = [
        (line, status, json.dumps({"completion_tokens": 2, **({"code": "internal"} if coded else {})}))
        for line, (status, coded) in enumerate(rows, 1)
    ]
    found = tally(known, stats, {})  # type: ignore[arg-type]
    assert replace(found, finished=True).problems() == []
    assert found.rows.ended == len(rows) and found.tokens.output == 2 * found.rows.ok


COUNTS = st.integers(0, 900)


@given(COUNTS, COUNTS, st.integers(0, 9), COUNTS, st.integers(1, 3), st.integers(0, 2))
def test_every_token_computed_again_has_one_reason(
    computed: int, preempted: int, last: int, output: int, runs: int, restarts: int
) -> None:
    spent = {"prompt_computed": computed + last, "prompt_last": last, "prompt_preempted": preempted}
    spent |= {"output_preempted": output, "runs": runs, "restarts": restarts}
    found = tally(Report(Rows(), Tokens(1000, 400)), [], {name: float(number) for name, number in spent.items()})
    again = found.again
    assert again.preempted + again.other + again.restarted == found.tokens.prompt_recomputed == max(0, computed - 400)
    assert (again.last, again.output) == (last, output) and again.preempted <= preempted
    assert again.other == 0 if runs > 1 or restarts else again.restarted == 0
    assert found.problems() == []


def test_what_is_left_over_is_not_given_a_reason_that_nobody_has_looked_for() -> None:
    assert again_line(Again(other=3)) == "3 prompt tokens for other reasons"


def test_reasons_that_do_not_add_up_are_a_problem() -> None:
    good = Report(Rows(1, 1), Tokens(1000, 400, 450, 50), again=Again(preempted=20, other=30))
    assert good.problems() == [] and replace(good, again=Again(preempted=20)).problems()


def broken_at(at: int) -> Callable[[int], None]:
    def look(rounds: int) -> None:
        if rounds == at:
            raise KeyboardInterrupt

    return look
