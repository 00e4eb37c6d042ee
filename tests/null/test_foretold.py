"""What a run says of itself before its first step and on its way, and what its report makes of that."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from echo_job import ROWS, EchoJob, Watched, chat, completion, echo_backend, interrupt
from hypothesis import given
from hypothesis import strategies as st
from test_explain import PRETEND, file, options, rows

from shoal.core.config import EngineConfig
from shoal.core.errors import ShoalError
from shoal.jobs.foretold import Foretold
from shoal.jobs.report import compared, to_json
from shoal.jobs.tally import look_report
from shoal.preview import foresee, paperwork
from shoal.preview.command import explain
from shoal.preview.course import Course, Learnt, Rates
from shoal.preview.forecast import in_bulk, simulate, work_of
from shoal.preview.foresee import UNMEASURED, Foreseer
from shoal.preview.look import Looked, look
from shoal.preview.machine import ONLY_PROCESSOR
from shoal.preview.paperwork import FEW, Paperwork

Jobs = Callable[..., EchoJob]
CONFIG = EngineConfig(step_tokens=512, max_sequences=32)
SHARES = np.linspace(0.02, 0.98, 49)
NONE = np.zeros(0)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresee, "kept", lambda *_: PRETEND)


def fixed(count: int = 80) -> list[str]:
    return [
        completion(i, f"a river {i % 9} and a fish {i}", max_tokens=3 + i % 9, ignore_eos=True) for i in range(count)
    ]


@pytest.mark.usefixtures("kept")
def test_a_report_has_what_was_predicted_beside_what_came_of_it(job: Jobs) -> None:
    one = job([*fixed(), fixed()[0].replace("r0", "twin"), "{"])
    one.seer = Foreseer()
    assert one.run() == 3
    said, report = one.report.predicted, one.report
    assert said is not None and said.seconds is not None and said.seconds[0] == said.seconds[1] > 0
    found = {each.name: each for each in compared(report)}
    for name in ("prompt tokens computed", "output tokens"):
        assert found[name].low == found[name].high == found[name].actual > 0
    assert found["time"].actual == report.seconds.wall and report.reused.duplicates == 1
    assert json.loads(to_json(report))["compared"][0]["actual"] == report.tokens.prompt_computed
    assert look_report(one.out) == report
    alone = job(one.rows)
    assert alone.run() == 3 and alone.final() == one.final() and alone.report.predicted is None
    assert "predicted" in one.said and "prompt tokens computed" in one.said


def test_without_a_calibration_it_says_so(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresee, "kept", lambda *_: None)
    one = job(fixed())
    one.seer = Foreseer()
    assert one.run() == 0
    said = one.report.predicted
    assert said is not None and said.seconds is None and said.why == UNMEASURED and UNMEASURED in one.said
    assert said.prompt_tokens == one.report.tokens.prompt_computed


@pytest.mark.usefixtures("kept")
def test_the_processor_s_measurement_says_nothing_of_another_device(job: Jobs) -> None:
    one = job(fixed(9))
    one.seer = Foreseer()
    assert one.run(device="cuda") == 0  # the backend that hashes is used as it is
    said = one.report.predicted
    assert said is not None and said.why == ONLY_PROCESSOR and said.seconds is said.kv_bytes is None
    assert said.prompt_tokens == one.report.tokens.prompt_computed
    alike = options(one.root / "in.jsonl")
    found = explain(replace(alike, job=replace(alike.job, device="cuda")))
    assert found.time is None and found.no_time == ONLY_PROCESSOR


def test_a_prediction_that_fails_is_a_reason_in_the_report_and_the_job_goes_on(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ShoalError("no room for it")

    monkeypatch.setattr(foresee, "kept", broken)
    one = job(fixed())
    one.seer = Foreseer()
    assert one.run() == 0 and one.report.predicted is not None
    assert one.report.predicted.why == "no room for it" and one.report.predicted.seconds is None


def test_what_fails_before_anything_is_known_is_a_reason_too(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresee, "served", lambda *_: {}["units"])
    one = job(fixed())
    one.seer = Foreseer()
    assert one.run() == 0
    assert one.report.predicted == Foretold(why="KeyError: 'units'")
    assert compared(one.report)[0].words()[0] == "–"


@pytest.mark.usefixtures("kept")
def test_what_was_said_first_stays_through_interruptions(job: Jobs) -> None:
    one = job(ROWS)
    one.seer = Foreseer()
    one.run(Watched(echo_backend(tokens=64, sequences=8), interrupt(30)))
    before = look_report(one.out)
    assert before.predicted is not None and not before.finished and before.rows.ok > 0
    assert one.run() == 0
    after = one.report.predicted
    assert after is not None and replace(after, soon=None, soon_span=None) == replace(
        before.predicted, soon=None, soon_span=None
    )


def test_the_journal_says_of_many_lines_what_it_says_of_each(job: Jobs) -> None:
    from shoal.jobs.journal import Journal

    one = job(ROWS)
    one.run(Watched(echo_backend(tokens=64, sequences=8), interrupt(30)))
    journal = Journal(one.state)
    lines = np.arange(1, 99_999, 7, dtype=np.int64)
    found = journal.ended(lines)
    assert found.tolist() == [journal.done(line) for line in lines.tolist()] and found.any()
    journal.close()


def test_no_more_requests_are_handed_over_for_the_measure_than_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed, dumps = list[int](), pickle.dumps

    def dump(one: object) -> bytes:
        handed.append(len(one) if isinstance(one, list) else 0)
        return dumps(one)

    with look(options(file(tmp_path, [completion(i, f"a fish {i}") for i in range(700)])).job) as looked:
        monkeypatch.setattr(pickle, "dumps", dump)
        assert paperwork.measure(looked).request > 0
    assert max(handed) == FEW


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_when_all_have_ended_lengths_are_those_that_ended(ended: list[int]) -> None:
    found = Learnt(ended, [False] * len(ended), NONE).lengths((np.arange(len(ended)) + 0.5) / len(ended))
    assert sorted(found.tolist()) == sorted(ended)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 300), st.integers(0, 200))
def test_answers_that_still_run_never_make_the_others_shorter(ended: list[int], running: int, age: int) -> None:
    alone = Learnt(ended, [False] * len(ended), NONE).lengths(SHARES)
    beside = Learnt(ended, [False] * len(ended), np.full(running, float(age))).lengths(SHARES)
    assert (beside >= alone).all()
    assert (beside[1:] <= beside[:-1]).all()  # some may never end


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.lists(st.integers(0, 300), max_size=60), st.booleans())
def test_what_is_not_known_lies_between_ending_at_once_and_never(ended: list[int], ages: list[int], cut: bool) -> None:
    learnt = Learnt(ended, [cut and length == max(ended) for length in ended], np.array(ages, dtype=np.float64))
    least, fit, most = (learnt.lengths(SHARES, tail) for tail in ("least", "fit", "most"))
    assert (least <= fit).all() and (fit <= most).all()
    assert (least[SHARES < learnt.left[-1]] >= max([0, *ages])).all() if len(learnt.left) else True


@pytest.mark.parametrize("soon", [1, 8])
def test_where_some_end_at_once_and_nobody_since_the_others_never_do(soon: int) -> None:
    luck = np.random.default_rng(soon)
    ended = np.maximum(luck.lognormal(np.log(soon), 0.3, 40), 1).astype(int).tolist()
    found = Learnt(ended, [False] * 40, np.full(160, 60.0)).lengths(np.array([0.9, 0.7, 0.1]))
    assert found[0] <= max(ended) and (found[1:] > 256).all()


def test_few_early_ends_are_no_sign_that_the_others_never_end() -> None:
    early = [31, 38, 40, 44, 47, 49, 50, 52]
    found = Learnt(early, [False] * 8, np.full(80, 52.0)).lengths(SHARES)
    assert found.max() < 1000


@pytest.mark.parametrize(("steps", "messages"), [(10, 10), (10_000, 600)])
def test_there_is_a_message_a_step_at_most_and_two_a_request(steps: int, messages: int) -> None:
    assert Paperwork(0.0, 0.0, 1.0).seconds(300, 9_000, steps) == messages


def test_answers_cut_off_count_as_longer_than_their_limits() -> None:
    found = Learnt([10] * 50 + [64] * 50, [False] * 50 + [True] * 50, NONE).lengths(np.array([0.9, 0.6, 0.4, 0.1]))
    assert found[:2].tolist() == [10, 10] and (found[2:] > 64).all()


@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_the_first_to_end_say_how_long_the_others_may_be(spread: float) -> None:
    luck = np.random.default_rng(3)
    lengths = np.sort(luck.lognormal(np.log(100), spread, 256).astype(np.int64))
    early = lengths[:26]  # all began together
    found = Learnt(early.tolist(), [False] * 26, np.full(230, float(early[-1]))).lengths(SHARES)
    assert float(np.median(found)) == pytest.approx(100, rel=0.35)


def course(looked: Looked, blocks: int = 4000) -> Course:
    return Course(Foretold(), looked, Rates(PRETEND.cost(), CONFIG, blocks, Paperwork(0.0, 0.0, 0.0)))


@pytest.mark.parametrize("slower", [1.0, 1.7, 0.6])
def test_on_a_machine_that_is_slower_than_measured_the_time_left_is_longer(tmp_path: Path, slower: float) -> None:
    with look(options(file(tmp_path, rows(1, 30, 12))).job) as looked:
        real = simulate(looked, looked.limits, PRETEND.cost(), CONFIG, 4000)
        one = course(looked)
        for tokens, seconds in real.course[len(real.course) // 10 :: 7]:
            left = one.left(slower * seconds, round(tokens), 0, [1.0] * 32)
            assert left is not None
            assert slower * seconds + left == pytest.approx(slower * real.seconds, rel=0.12)


def test_at_the_end_nothing_is_left(tmp_path: Path) -> None:
    with look(options(file(tmp_path, rows(2))).job) as looked:
        real = simulate(looked, looked.limits, PRETEND.cost(), CONFIG, 4000)
        left = course(looked).left(real.seconds, round(real.course[-1][0]), 0, [])
    assert left == pytest.approx(0.0, abs=0.05 * real.seconds)


@pytest.mark.parametrize("middle", [20, 60, 150])
def test_lengths_are_learnt_from_the_rows_that_have_ended(tmp_path: Path, middle: int) -> None:
    luck = np.random.default_rng(middle)
    lines = [chat(i, f"a river {i}", max_tokens=256) for i in range(700)]
    with look(options(file(tmp_path, lines)).job) as looked:
        answers = np.clip(luck.lognormal(np.log(middle), 0.5, len(looked.units)), 1, 256).astype(np.int64)
        real = simulate(looked, answers, PRETEND.cost(), CONFIG, 4000)
        one = course(looked)
        assert one.left(1.0, 100, 0, [1.0] * 32) is None
        job = walk(answers[looked.order].tolist(), 32, 35)
        for place in job.ended:
            unit = int(looked.order[place])
            one.ended(int(looked.units["row"][unit]), int(answers[unit]))
        prompts = int(looked.cost[: job.started].sum())
        seconds = float(np.interp(prompts + job.output, *zip(*real.course, strict=True)))
        left = one.left(seconds, prompts + job.output, job.output, job.running)
    assert left is not None
    assert seconds + left == pytest.approx(real.seconds, rel=0.25)  # 35 lengths alone err by a tenth


def test_rows_cost_by_the_blocks_they_list_and_open_in_both_ways_of_foretelling(tmp_path: Path) -> None:
    config = EngineConfig(step_tokens=512, max_sequences=32)
    free, dear = PRETEND.cost(), msgspec.structs.replace(PRETEND, listed=1e-5, opened=1e-3).cost()
    with look(options(file(tmp_path, rows(3))).job) as looked:
        opened = sum(np.ceil(looked.units["length"] / 32) * looked.units["samples"])
        ways = [
            lambda cost: simulate(looked, looked.limits, cost, config, 4000).seconds,
            lambda cost: in_bulk(work_of(looked, looked.limits), cost, config, 4000).seconds,
        ]
        more = [way(dear) - way(free) for way in ways]
    assert more[0] == pytest.approx(more[1], rel=0.05)
    assert more[0] > 0.5e-3 * opened


@dataclass
class Walk:
    """A job of so many seats when some rows have ended."""

    ended: list[int]
    started: int
    output: int
    running: list[float]


def walk(answers: list[int], seats: int, until: int) -> Walk:
    """A token for each running row at a time, in order."""
    running, started, output, ended = dict[int, int](), 0, 0, list[int]()
    while len(ended) < until:
        while len(running) < seats:
            running[started] = 0
            started += 1
        for place in list(running):
            running[place] += 1
            output += 1
            if running[place] == answers[place]:
                del running[place]
                ended.append(place)
    return Walk(ended, started, output, [float(age) for age in running.values()])
