"""Rows that ask for the same are computed once, and nobody can tell from the output."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from echo_job import EchoJob, Mortal, Watched, chat, completion, echo_backend, interrupt
from faulty import Crash, FaultyFiles
from plan_jobs import Line, plan_of

from shoal.core.types import Finish, Request
from shoal.jobs.options import Order

TEXTS = ("Name a river", "Name a lake", "Name a sea and say why it is one")


def repeated(count: int, seed: int = 1) -> list[str]:
    """Rows of which most ask for what an earlier one asks for, in every way that a row can be asked."""
    luck = random.Random(seed)
    rows = []
    for number in range(count):
        text, style = luck.choice(TEXTS), luck.randrange(6)
        body = [
            {"temperature": 0},
            {"temperature": 0, "n": 2, "max_tokens": 9},
            {"temperature": 0.8, "seed": luck.randrange(2), "n": 1 + luck.randrange(3)},
            {"temperature": 0, "stop": ["\n", "x"], "logprobs": True, "top_logprobs": 2},
            {"temperature": 0.8},  # without a seed: a question of its own
            {"temperature": 0, "prompt_logprobs": 1},
        ][style]
        make = completion if style == 5 else chat
        rows.append(make(number, text, user=f"user {number}", **body))
    return rows


ROWS = repeated(150)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What ROWS leave when every row is computed."""
    job = EchoJob(tmp_path_factory.mktemp("apart"), ROWS)
    with computed_apart():
        assert job.run() == 0
    assert job.report.reused.duplicates == 0
    return job.final()


def computed_apart() -> mock._patch:
    """The control: no row has a key."""
    return mock.patch("shoal.jobs.keys.RequestKeys.of", lambda *_: [])


def first_of_their_kind() -> set[int]:
    """Lines of ROWS that nobody before has asked, read as a person would."""
    seen, lines = set(), set()
    for line, row in enumerate(map(json.loads, ROWS), 1):
        body = {name: value for name, value in row["body"].items() if name != "user"}
        own = row["custom_id"] if body["temperature"] and "seed" not in body else None
        question = json.dumps([row["url"], own, body], sort_keys=True)
        if question not in seen:
            lines.add(line)
        seen.add(question)
    return lines


@pytest.mark.parametrize("order", list(Order))
def test_equal_rows_run_once_and_every_byte_is_as_if_each_had(job, apart, order: Order) -> None:
    one = job(ROWS, order=order)
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend) == 0
    if order is Order.FINISH:
        assert sorted(one.out.read_bytes().splitlines()) == sorted(apart[0].splitlines())
    else:
        assert one.final() == apart
    report = one.report
    assert report.rows.ok == report.rows.total == len(ROWS) and report.problems() == []
    assert report.reused.duplicates > len(ROWS) // 2
    usage = [line["response"]["body"]["usage"] for line in one.answers()]
    assert report.tokens.output == sum(part["completion_tokens"] for part in usage)
    assert report.tokens.prompt_computed == report.tokens.prompt_bound
    stats = [json.loads(line) for line in (one.state / "rows.jsonl").read_text().splitlines()]
    copies = [row for row in stats if "copy_of" in row]
    assert len(copies) == report.reused.duplicates and all(row["copy_of"] < row["line"] for row in copies)
    assert report.reused.output_tokens == sum(row["completion_tokens"] for row in copies)
    assert {line_of(request) for request in backend.submitted} == first_of_their_kind()
    assert f"{len(copies)} rows ask for what an earlier one asks for" in one.said


def line_of(request: Request) -> int:
    return int(request.id.split(".")[0])


def test_sampled_rows_without_a_seed_are_never_one(job) -> None:
    one = job([chat(i, "the same", temperature=0.9, max_tokens=20) for i in range(20)])
    assert one.run() == 0 and one.report.reused.duplicates == 0
    plain = job([json.dumps({"text": "the same"})] * 20, prompt="{text}", body={"temperature": 0.9, "max_tokens": 5})
    backend = Watched(echo_backend(), lambda rounds: None)
    assert plain.run(backend) == 0 and len(backend.submitted) == 20 and plain.report.reused.duplicates == 0


def test_plain_rows_keep_their_own_columns(job) -> None:
    rows = [json.dumps({"text": ("red", "blue")[i % 2], "mine": i}) for i in range(10)]
    one = job(rows, prompt="{text}", body={"temperature": 0, "max_tokens": 5})
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend) == 0 and len(backend.submitted) == 2
    answers = one.answers()
    assert [row["mine"] for row in answers] == list(range(10))
    assert len({(row["text"], row["answer"]) for row in answers}) == 2


def test_a_duplicate_of_a_scored_prompt_counts_nothing(job) -> None:
    """Scored prompts share no prefix, so that only being the same row saves them."""
    rows = [completion(i, "a rather long prompt " * 4, echo=True, logprobs=1, temperature=0) for i in range(30)]
    one, single = job(rows), job(rows[:1])
    assert one.run() == single.run() == 0
    assert one.report.tokens.prompt_bound == single.report.tokens.prompt_bound == one.report.tokens.prompt_computed


# -- what fails --------------------------------------------------------------------------------------


def test_copies_of_a_row_that_cannot_fit_fail_as_it_does_without_being_tried(job) -> None:
    rows = [chat(i, "word " * 300 if i % 2 else f"short {i}", temperature=0) for i in range(12)]
    one, control = job(rows), job(rows)
    backend = Watched(echo_backend(num_blocks=12), lambda rounds: None)
    assert one.run(backend) == 3 and len(backend.submitted) == 7
    with computed_apart():
        assert control.run(echo_backend(num_blocks=12)) == 3
    assert one.final() == control.final() and one.report.rows.failed == 6 and one.report.reused.duplicates == 0


class Unlucky(Watched):
    """Ends the first `bad` requests it is given with an error of ours."""

    def __init__(self, bad: int) -> None:
        super().__init__(echo_backend(), lambda rounds: None)
        self.bad = bad

    def outputs(self, timeout: float):
        news = super().outputs(timeout)
        for output in news.outputs if news is not None else ():
            if output.finish is not None and self.bad:
                self.bad -= 1
                output.finish, output.error = Finish.ERROR, "the executor stumbled"
        return news


@pytest.mark.parametrize(("bad", "failed"), [(1, 1), (2, 2), (3, 9)])
def test_when_the_first_fails_by_our_fault_the_next_is_run(job, bad: int, failed: int) -> None:
    one = job([chat(i, "the same", temperature=0) for i in range(9)])
    backend = Unlucky(bad)
    assert one.run(backend) == 3
    assert one.codes() == ["internal"] * failed and len(one.answers()) == 9 - failed
    assert [line["x_shoal"]["line"] for line in one.failures()] == list(range(1, failed + 1))
    assert one.report.problems() == [] and len(backend.submitted) == min(bad + 1, 3)


def test_copies_of_a_row_that_kills_engines_do_not_cost_two_engines_each(job) -> None:
    class Killed(Mortal):
        def dies(self, running: set[int]) -> bool:
            return bool(running - {1, 2})

    same = {"temperature": 0, "max_tokens": 30}
    one = job([chat(1, "good"), chat(2, "fine"), *(chat(i, "deadly", **same) for i in range(3, 40))])
    assert one.run_mortal(Killed) == 3
    assert one.codes() == ["engine_died"] * 37 and len(one.answers()) == 2
    assert Killed.made <= 9


# -- stopped half way ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 8, 11, 13, 14, 15, 17])
def test_an_interrupted_job_goes_on_to_the_same_bytes(job, apart, at: int) -> None:
    one = job(ROWS)
    with mock.patch("shoal.jobs.copies.SOME", 5):
        code = one.run(Watched(echo_backend(), interrupt(at, signal.SIGTERM)))
        assert code == 5 and apart[0].startswith(one.out.read_bytes())
        assert one.run() == 0
    assert one.final() == apart and one.report.problems() == []
    assert one.report.reused.duplicates > len(ROWS) // 2


@pytest.mark.parametrize("some", [1, 3, 256])
def test_a_crash_at_every_point_changes_no_byte_and_no_answered_row_is_asked_again(job, apart, some: int) -> None:
    with mock.patch("shoal.jobs.copies.SOME", some), mock.patch("shoal.jobs.journal.COMMIT_ROWS", 7):
        files = FaultyFiles()
        with mock.patch("shoal.jobs.run.DiskFiles", lambda: files):
            assert job(ROWS).run() == 0
        for at in range(5, files.count, 5):
            one = job(ROWS)
            broken = FaultyFiles(at)
            with mock.patch("shoal.jobs.run.DiskFiles", lambda broken=broken: broken), pytest.raises(Crash):
                one.run()
            broken.crash("scattered", random.Random(at))
            before = journalled(one)
            backend = Watched(echo_backend(), lambda rounds: None)
            assert one.run(backend) == 0
            assert one.final() == apart, f"crash at operation {at}"
            assert not {line_of(request) for request in backend.submitted} & before


def journalled(job: EchoJob) -> set[int]:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(job.state / "journal.db")) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name='results'").fetchone():
            return set()
        return {line for (line,) in database.execute("SELECT line FROM results")}


def test_a_group_left_without_its_first_row_goes_on(job) -> None:
    """The first has failed by our fault, and the job is stopped before the next has run."""
    one = job([chat(i, "the same", temperature=0, max_tokens=40) for i in range(9)])

    class Once(Unlucky):
        def outputs(self, timeout: float):
            news, left = None, self.bad
            while self.bad == left == 1 and not news:
                news = super().outputs(timeout)
            if self.bad < left:
                signal.raise_signal(signal.SIGTERM)
            return news

    assert one.run(Once(1)) == 5 and one.report.rows.failed == 1
    assert one.report.rows.ended < 9
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend) == 3 and one.report.rows.ok == 8
    assert [request.id for request in backend.submitted] == ["2.0.0"]


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_that_of_the_rows_without_their_copies(tmp_path: Path, seed: int) -> None:
    luck = random.Random(seed)
    lines: list[Line] = []
    for _ in range(60):
        if lines and luck.random() < 0.6:
            lines.append(luck.choice(lines))
            continue
        prompts = tuple(
            tuple(luck.randrange(3) for _ in range(luck.randrange(1, 9))) for _ in range(luck.choice([1, 2]))
        )
        asks = tuple(bytes([luck.randrange(1, 250)]) * 16 for _ in prompts) if luck.random() < 0.8 else ()
        lines.append(Line(prompts, samples=luck.choice([1, 3]), asks=asks, score_from=luck.choice([-1, 1])))
    first: dict[object, int] = {}
    wanted: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        original = first.setdefault((line.asks, line.samples) if line.asks else row, row)
        if original != row:
            wanted.setdefault(original, []).append(row)
    plan = plan_of(lines, tmp_path / "all")
    assert list(plan.copies()) == [(original, row) for original in sorted(wanted) for row in wanted[original]]
    assert {row: plan.copies_of(row) for row in range(60) if plan.copies_of(row)} == wanted
    kept = [line for row, line in enumerate(lines) if row not in {r for rows in wanted.values() for r in rows}]
    control = plan_of([replace(line, asks=()) for line in kept], tmp_path / "kept")
    assert (plan.bound, plan.num_requests, plan.last_again) == (control.bound, control.num_requests, control.last_again)
    assert [u.tokens for u in plan.units_from()] == [u.tokens for u in control.units_from()]
    assert [u.futures for u in plan.units_from()] == [u.futures for u in control.units_from()]
    assert plan.prompt_tokens == control.prompt_tokens + plan.copied_tokens
    assert plan.copied_tokens == sum(
        len(prompt) * lines[row].samples for rows in wanted.values() for row in rows for prompt in lines[row].prompts
    )


def test_a_row_refused_for_its_name_is_nobodys_original(tmp_path: Path) -> None:
    ask = (b"k" * 16,)
    lines = [Line(((1, 2),), name="a"), Line(((3, 4),), name="a", asks=ask), Line(((3, 4),), name="c" * 3, asks=ask)]
    plan = plan_of(lines, tmp_path)
    assert plan.num_bad == 1 and plan.num_copies == 0 and [unit.row for unit in plan.units_from()] == [0, 2]
