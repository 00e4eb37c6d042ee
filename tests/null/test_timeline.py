"""What a job computed when is kept whole and small, and how it stands is there for others to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest import mock

import pytest
from echo_job import ROWS, EchoJob, Watched, chat, echo_backend, interrupt
from hypothesis import given
from hypothesis import strategies as st
from test_live_report import broken_at, meta
from whole_job import SteppingClock

from shoal.jobs.display import Progress
from shoal.jobs.journal import Journal
from shoal.jobs.look import View, is_running
from shoal.jobs.pulse import LONGEST, PULSE, RECENT, TIMELINE, Pulse, Recorder
from shoal.jobs.tally import SPENT, look_report
from shoal.jobs.timeline import MOST, Timeline
from shoal.show.story import noted

Jobs = Callable[..., EchoJob]
PIECES = st.lists(
    st.tuples(st.floats(0, 40), st.integers(0, 9000), st.integers(0, 300), st.floats(0, 1), st.integers(0, 64)),
    min_size=1,
    max_size=40,
)


def drawn(pieces: list[tuple[float, int, int, float, int]]) -> Timeline:
    line, at = Timeline(width=1.0), 0.0
    for seconds, prompt, output, kv, running in pieces:
        line.add(at, at + seconds, prompt, output, kv, running)
        at += seconds
    return line


@given(PIECES, st.integers(1, 30))
def test_nothing_is_lost_when_columns_become_wider(pieces: list[tuple[float, int, int, float, int]], most: int) -> None:
    line = drawn(pieces)
    line.shrink(most)
    assert len(line.prompt) == len(line.output) == len(line.kv) == len(line.running) <= most
    assert sum(line.prompt) == pytest.approx(sum(piece[1] for piece in pieces))
    assert sum(line.output) == pytest.approx(sum(piece[2] for piece in pieces))
    assert max(line.kv) == max(piece[3] for piece in pieces)
    assert max(line.running) == max(piece[4] for piece in pieces)
    assert line.end >= sum(piece[0] for piece in pieces) - 1e-6


@given(PIECES, st.integers(1, 30))
def test_the_last_minutes_are_those_of_the_whole(pieces: list[tuple[float, int, int, float, int]], most: int) -> None:
    line, whole = drawn(pieces), drawn(pieces)
    line.forget(most)
    assert line.prompt == whole.prompt[-most:] and line.kv == whole.kv[-most:] and line.end == whole.end


def test_a_long_step_is_spread_over_the_seconds_that_it_took() -> None:
    line = Timeline(width=1.0)
    line.add(0.5, 4.5, 400, 8, 0.5, 3)
    assert line.prompt == pytest.approx([50, 100, 100, 100, 50]) and line.running == [3] * 5


def test_however_long_a_job_takes_it_notes_little() -> None:
    line = Timeline()
    for second in range(100_000):
        line.add(second, second + 1, 12345, 678, 0.123456, 256)
        line.shrink()
    assert MOST // 2 <= len(line.prompt) <= MOST and len(json.dumps(line.kept().prompt)) < 6000


def test_the_time_line_has_all_that_was_computed(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run() == 0
    pulse, line = noted(one.out)
    assert pulse is not None and line is not None
    with View(one.out) as view:
        spent = json.loads(view.meta(SPENT) or "")
    assert sum(line.prompt) == pytest.approx(spent["prompt_computed"], abs=len(line.prompt)) and sum(line.prompt) > 900
    assert sum(line.output) == pytest.approx(spent["output_computed"], abs=len(line.prompt)) and sum(line.output) > 500
    assert (pulse.state, pulse.progress.rows_done, pulse.progress.rows_total) == ("ended", 120, 120)


def test_a_job_that_goes_on_goes_on_with_its_time_line(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run(Watched(echo_backend(tokens=64), interrupt(12))) == 5
    _, first = noted(one.out)
    assert one.run() == 0
    _, line = noted(one.out)
    assert first is not None and line is not None and first.begins == [] and len(line.begins) == 1
    spent = sum(first.prompt)
    assert spent > 0 and sum(line.prompt) > spent and line.end >= line.begins[0]


def test_a_time_line_that_cannot_be_read_stops_no_job(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run(Watched(echo_backend(tokens=64), interrupt(12))) == 5
    meta(one, "UPDATE meta SET value='[]' WHERE name='timeline'")
    assert one.run() == 0
    _, line = noted(one.out)
    assert line is not None and line.since > 0 and sum(line.prompt) > 0


def test_rows_that_are_computed_again_to_compare_are_not_in_it(job: Jobs) -> None:
    rows = [chat(i, f"{i} fish", seed=i) for i in range(40)]
    one, other = job(rows), job(rows)
    one.run()
    other.run(verify=1.0)
    lines = [noted(each.out)[1] for each in (one, other)]
    sums = [sum(line.prompt) for line in lines if line is not None]
    assert len(sums) == 2 and sums[0] == pytest.approx(sums[1], abs=len(lines[1].prompt))  # type: ignore[union-attr]


@pytest.mark.parametrize("dies", [False, True])
def test_nor_where_an_engine_is_started_to_compute_them(job: Jobs, dies: bool) -> None:
    one = job(ROWS[:2])
    one.run()
    journal, recorder = Journal(one.state), Recorder()
    recorder.checking = True
    recorder.loaded(1.0)
    if dies:
        recorder.died()
        recorder.loaded(2.0)
    recorder.hear(3.0, (500, 50), 0.5, 0, 9)
    recorder.note(journal, Progress(2, 2))
    journal.commit()
    journal.close()
    pulse, line = noted(one.out)
    assert pulse is not None and pulse.state == "checking" and line is not None and line.prompt == []


def test_what_a_killed_job_noted_is_there_with_its_rows(job: Jobs) -> None:
    one = job(ROWS)
    with pytest.raises(KeyboardInterrupt), mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(30)))
    pulse, line = noted(one.out)
    assert pulse is not None and line is not None and not is_running(one.out)
    assert pulse.state == "running" and sum(line.prompt) > 0 and look_report(one.out).problems() == []


def test_a_running_job_says_what_runs_for_long(job: Jobs) -> None:
    one, seen = job([chat(i, max_tokens=300, ignore_eos=True) for i in range(40)]), list[Pulse]()

    def look(rounds: int) -> None:
        with View(one.out) as view:
            if (pulse := view.read(PULSE, Pulse)) is not None:
                seen.append(pulse)

    with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        assert one.run(Watched(echo_backend(sequences=8), look)) == 0
    assert seen[0].state == "loading" and seen[-1].state == "running"
    named = [pulse.longest for pulse in seen if pulse.longest]
    assert named and all(len(rows) <= LONGEST for rows in named) and all(len(p.recent.kv) <= RECENT for p in seen)
    assert all([r.seconds for r in rows] == sorted((r.seconds for r in rows), reverse=True) for rows in named)
    assert any(pulse.running == 8 and pulse.waiting > 0 for pulse in seen)


def test_notes_are_kept_by_the_next_commit_and_not_before(job: Jobs) -> None:
    one = job(ROWS[:2])
    one.run()
    journal = Journal(one.state)
    before = journal.meta(TIMELINE)
    journal.note(TIMELINE, "{}")
    assert journal.meta(TIMELINE) == before and journal.meta(SPENT)
    journal.commit()
    assert journal.meta(TIMELINE) == "{}"
    journal.close()
