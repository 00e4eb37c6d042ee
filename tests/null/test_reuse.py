"""Jobs with a cache: what an earlier job has computed is not computed again, and no byte tells."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest
from echo_job import EchoJob, Watched, chat, completion, echo_backend, interrupt
from faulty import Crash, FaultyFiles
from test_copies import ROWS, computed_apart, repeated

from shoal.core.types import Finish
from shoal.jobs.cache import NAME, look
from shoal.jobs.options import Order
from shoal.jobs.state import folder_of


def mixed(count: int, seed: int = 5) -> list[str]:
    """Rows of every kind whose prompts share prefixes; few are equal."""
    luck = random.Random(seed)
    rows = []
    for number in range(count):
        text = f"{luck.choice(['Sort these words, please', 'Say which is larger'])}: {luck.randrange(count * 3)}"
        body = [{"temperature": 0}, {"temperature": 0.8}, {"temperature": 0.7, "seed": 3, "n": 3}][luck.randrange(3)]
        if number % 9 == 4:
            rows.append(completion(number, [text, text + " now"], prompt_logprobs=1, **body))
        else:
            rows.append(chat(number, text, max_tokens=3 + luck.randrange(9), stop=["a"] * (number % 2), **body))
    return rows


def cold(job, rows: list[str], **options: object) -> EchoJob:
    """The same rows without a cache and without copies."""
    one = job(rows, **options)
    with computed_apart():
        assert one.run() in (0, 3)
    return one


def watched() -> Watched:
    return Watched(echo_backend(), lambda rounds: None)


def test_the_same_file_costs_nothing_the_second_time(job, tmp_path: Path) -> None:
    for rows in (mixed(120), ROWS):
        apart = cold(job, rows)
        first, second = (job(rows, cache=tmp_path / "cache") for _ in range(2))
        assert first.run() == 0 and first.report.reused.cached == 0
        backend = watched()
        assert second.run(backend) == 0 and backend.submitted == [] and backend.rounds == 0
        assert first.final() == second.final() == apart.final()
        report = second.report
        assert report.problems() == [] and report.rows.ok == len(rows)
        assert report.reused.cached + report.reused.duplicates == len(rows)
        assert report.tokens.prompt_bound == report.tokens.prompt_computed == 0
        assert report.reused.prompt_tokens == report.tokens.prompt == apart.report.tokens.prompt
        assert report.reused.output_tokens == report.tokens.output == apart.report.tokens.output


def test_copies_of_what_the_cache_knows_are_not_said_to_come_from_an_earlier_run(job, tmp_path: Path) -> None:
    rows = [chat(i, "the same", temperature=0) for i in range(5)]
    assert job(rows, cache=tmp_path / "cache").run() == 0
    more = job([*rows, chat(5, "another")], cache=tmp_path / "cache")
    assert more.run() == 0
    assert "1 rows were answered by earlier jobs" in more.said and "by an earlier run" not in more.said
    half = job(rows[:1] + [chat(i) for i in range(1, 200)])
    assert half.run(Watched(echo_backend(), interrupt(12))) == 5
    done = half.report.rows.ok
    assert half.run() == 0 and 0 < done < 200 and f"{done} rows were answered by an earlier run" in half.said


@pytest.mark.parametrize("order", [Order.PLAN, Order.INPUT])
def test_an_edit_costs_the_edited_rows_and_prompts_their_own_bound(job, tmp_path: Path, order: Order) -> None:
    rows = mixed(300)
    assert job(rows, cache=tmp_path / "cache").run() == 0
    edited = sorted(random.Random(2).sample(range(300), 12))
    for number in edited:
        row = json.loads(rows[number])
        row["body"] |= {"max_tokens": 17}
        rows[number] = json.dumps(row)
    one, alone, apart = (
        job(rows, cache=tmp_path / "cache", order=order),
        job([rows[n] for n in edited]),
        cold(job, rows),
    )
    backend = watched()
    assert one.run(backend) == alone.run() == 0
    assert one.final() == apart.final()
    assert {int(request.id.split(".")[0]) - 1 for request in backend.submitted} == set(edited)
    assert one.report.reused.cached + one.report.reused.duplicates == 288
    assert one.report.tokens.prompt_bound == alone.report.tokens.prompt_bound
    if order is Order.PLAN:
        assert one.report.tokens.prompt_computed == one.report.tokens.prompt_bound
        assert one.report.tokens.prompt_computed < apart.report.tokens.prompt_computed / 10


def test_more_samples_cost_those_that_are_new(job, tmp_path: Path) -> None:
    for samples, new in ((2, 2), (5, 3), (3, 0)):
        rows = [
            chat(0, "one", n=samples, temperature=1, seed=1),
            completion(1, ["a b", "c d"], n=samples, temperature=0),
        ]
        one, apart, backend = job(rows, cache=tmp_path / "cache"), cold(job, rows), watched()
        assert one.run(backend) == 0 and one.final() == apart.final()
        assert len(backend.submitted) == 3 * new


def test_a_prompt_of_a_row_that_is_known_is_not_computed_for_the_others(job, tmp_path: Path) -> None:
    assert job([completion(1, ["a b", "c d"], temperature=0)], cache=tmp_path / "cache").run() == 0
    rows, backend = [completion(7, ["x y", "c d", "a b"], temperature=0, prompt_logprobs=0)], watched()
    assert job(rows, cache=tmp_path / "cache").run(backend) == 0 and len(backend.submitted) == 3
    rows, backend = [completion(7, ["x y", "c d", "e f", "a b"], temperature=0)], watched()
    one, apart = job(rows, cache=tmp_path / "cache"), cold(job, rows)
    assert one.run(backend) == 0 and [r.id for r in backend.submitted] == ["1.0.0", "1.2.0"]
    assert one.final() == apart.final()


def test_another_engine_finds_nothing_and_other_words_for_the_same_rows_everything(job, tmp_path: Path) -> None:
    rows = [chat(i, temperature=0) for i in range(12)]
    assert job(rows, cache=tmp_path / "cache").run() == 0
    for options, asked in (
        ({"weights": "fp32"}, 12),
        ({"seed": 5}, 0),
        ({"body": {"skip_special_tokens": True}}, 0),
        ({"openai": True}, 0),
    ):
        backend = watched()
        assert job(rows, cache=tmp_path / "cache", **options).run(backend) == 0
        assert len(backend.submitted) == asked, options
    with mock.patch.dict("os.environ", SHOAL_ISA="scalar"):
        backend = watched()
        assert job(rows, cache=tmp_path / "cache").run(backend) == 0 and len(backend.submitted) == 12


def test_rows_that_failed_are_tried_again(job, tmp_path: Path) -> None:
    rows = [chat(i, "word " * 300 if i % 2 else None, temperature=0) for i in range(6)]
    assert job(rows, cache=tmp_path / "cache").run(echo_backend(num_blocks=12)) == 3
    assert look(tmp_path / "cache").entries == 3
    one = job(rows, cache=tmp_path / "cache")
    assert one.run() == 0 and one.report.reused.cached == 3


def test_a_damaged_entry_is_computed_again(job, tmp_path: Path) -> None:
    rows = [chat(i, temperature=0) for i in range(20)]
    first = job(rows, cache=tmp_path / "cache")
    assert first.run() == 0
    with closing(sqlite3.connect(tmp_path / "cache" / NAME)) as database, database:
        database.execute("UPDATE entries SET value=substr(value, 1, 30) || x'00' WHERE rowid % 4 = 1")
    for asked in (5, 0):
        one, backend = job(rows, cache=tmp_path / "cache"), watched()
        assert one.run(backend) == 0 and len(backend.submitted) == asked
        assert one.final() == first.final()


def test_a_cache_that_cannot_be_used_is_said_once_and_costs_no_row(job, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"this is no database" * 100)
    one = job([chat(i, temperature=0) for i in range(30)], cache=tmp_path)
    assert one.run() == 0 and len(one.answers()) == 30
    assert one.said.count("the job goes on without it") == 1


def test_jobs_may_share_a_cache_while_they_run(job, tmp_path: Path) -> None:
    """One job finds what another has put there after it began."""
    rows = [chat(i, f"shared {i}", temperature=0) for i in range(1200)]
    one, two = job(rows, cache=tmp_path), job(rows[:1200], cache=tmp_path)

    def look(rounds: int) -> None:
        if rounds == 3:
            assert two.run() == 0

    backend = Watched(echo_backend(), look)
    assert one.run(backend) == 0 and one.final() == two.final()
    assert len(backend.submitted) < 1200


# -- stopped half way ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], tuple[bytes, bytes]]:
    """A cache that knows two thirds of some rows, these rows, and what they come to."""
    root = tmp_path_factory.mktemp("filled")
    rows = [*mixed(60), *(json.dumps(json.loads(r) | {"custom_id": f"x{i}"}) for i, r in enumerate(repeated(60)))]
    (root / "part").mkdir()
    (root / "whole").mkdir()
    assert (
        EchoJob(root / "part", [r for i, r in enumerate(rows) if i % 3], options={"cache": root / "cache"}).run() == 0
    )
    whole = EchoJob(root / "whole", rows)
    with computed_apart():
        assert whole.run() == 0
    return root / "cache", rows, whole.final()


def copy_of(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    with closing(sqlite3.connect(cache / NAME)) as source, closing(sqlite3.connect(folder / NAME)) as target:
        source.backup(target)
    return folder


def test_a_crash_at_every_point_changes_no_byte(job, filled, tmp_path: Path) -> None:
    cache, rows, wanted = filled
    with mock.patch("shoal.jobs.copies.SOME", 3), mock.patch("shoal.jobs.journal.COMMIT_ROWS", 7):
        files = FaultyFiles()
        with mock.patch("shoal.jobs.run.DiskFiles", lambda: files):
            assert job(rows, cache=copy_of(cache, tmp_path / "counted")).run() == 0
        for at in range(5, files.count, 3):
            own = copy_of(cache, tmp_path / f"cache{at}")
            one = job(rows, cache=own)
            broken = FaultyFiles(at)
            with mock.patch("shoal.jobs.run.DiskFiles", lambda broken=broken: broken), pytest.raises(Crash):
                one.run()
            broken.crash("scattered", random.Random(at))
            again = None if at % 2 else own  # going on without the cache, or with it
            assert one.run(cache=again) == 0
            assert one.final() == wanted, f"crash at operation {at}"
            assert one.report.problems() == []


def test_an_interrupted_job_counts_what_the_cache_gave_it_once(job, filled, tmp_path: Path) -> None:
    cache, rows, wanted = filled
    unbroken = job(rows, cache=copy_of(cache, tmp_path / "one"))
    assert unbroken.run() == 0
    for at in (1, 4, 9):
        one = job(rows, cache=copy_of(cache, tmp_path / f"cache{at}"))
        assert one.run(Watched(echo_backend(), interrupt(at, signal.SIGTERM))) == 5
        assert one.run(cache=None) == 0
        assert one.final() == wanted and one.report.reused == unbroken.report.reused
        assert one.report.tokens.prompt_bound == unbroken.report.tokens.prompt_bound


# -- computed again to compare ---------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_a_sample_of_the_answers_is_computed_again_and_is_the_same(job, filled, tmp_path: Path, share: float) -> None:
    cache, rows, wanted = filled
    one = job(rows, cache=copy_of(cache, tmp_path / "cache"), verify=share)
    control = job(rows, cache=copy_of(cache, tmp_path / "control"))
    assert one.run() == control.run() == 0 and one.final() == wanted
    report = one.report
    assert report.verified.differ == [] and 120 * share <= report.verified.rows <= 120 * share + 2
    assert (report.tokens, report.reused) == (control.report.tokens, control.report.reused)
    assert "verified" in one.said and "the same to the byte" in one.said


def test_a_finished_job_can_be_verified_and_the_same_rows_are_chosen(job) -> None:
    one = job([*ROWS, "broken"])
    assert one.run() == 3
    first, second = watched(), watched()
    assert one.run(first, verify=0.1) == one.run(second, verify=0.1) == 3
    assert [r.id for r in first.submitted] == [r.id for r in second.submitted] and first.submitted
    assert one.report.verified.rows == len({r.id.split(".")[0] for r in first.submitted})
    assert one.run(verify=0.0) == 3 and "had ended before" in one.said


class Lying(Watched):
    """Its first answer ends one token early."""

    def __init__(self) -> None:
        super().__init__(echo_backend(), lambda rounds: None)
        self.lied = False

    def outputs(self, timeout: float):
        news = super().outputs(timeout)
        for output in news.outputs if news is not None else ():
            if not self.lied and output.finish is not None and len(output.tokens) > 1:
                self.lied, output.finish = True, Finish.LENGTH
                del output.tokens[-1:]
        return news


def test_a_wrong_answer_in_the_cache_is_named_loudly_and_removed(job, tmp_path: Path) -> None:
    rows = [chat(i, temperature=0) for i in range(10)]
    assert job(rows, cache=tmp_path / "cache").run(Lying()) == 0
    one = job(rows, cache=tmp_path / "cache", verify=1.0)
    assert one.run() == 1
    (line,) = one.report.verified.differ
    assert f"line {line} was computed again and is NOT what was answered" in one.said
    assert "ANSWERS ARE NOT WHAT COMPUTING THEM AGAIN GIVES" in one.said and f"lines {line}" in one.said
    assert one.run() == 1, "as it ended before"
    assert look(tmp_path / "cache").entries == 9
    mended = job(rows, cache=tmp_path / "cache", verify=1.0)
    assert mended.run() == 0 and mended.report.reused.cached == 9
    assert mended.final() == cold(job, rows).final() != one.final()


def test_a_verification_that_is_interrupted_goes_on_later(job) -> None:
    one = job([chat(i, temperature=0) for i in range(40)])
    assert one.run() == 0
    assert one.run(Watched(echo_backend(), interrupt(2, signal.SIGTERM)), verify=1.0) == 5
    assert not one.report.finished
    assert one.run(verify=1.0) == 0 and one.report.verified.rows == 40 and one.report.finished
    assert (folder_of(one.out) / "finished.json").exists()
