"""`shoal retry` answers what failed by no fault of its own, and leaves all else as it was."""

from __future__ import annotations

import io
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from echo_job import EchoJob, chat, echo_backend
from rich.console import Console

from shoal.client import InProcess, News
from shoal.core.errors import StateError
from shoal.core.types import Finish
from shoal.jobs.files import DiskFiles
from shoal.jobs.look import View, output_of
from shoal.jobs.note import read_note
from shoal.jobs.options import FailureBudget, JobOptions, Order
from shoal.jobs.retry import Again, retry_job
from shoal.jobs.run import run_job
from shoal.jobs.tally import look_report

BAD = json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}})
ROWS = [chat(i) for i in range(12)] + [BAD] + [chat(i) for i in range(12, 24)]


class Stumbles(InProcess):
    """An engine some of whose requests fail by our fault: those of these lines."""

    def __init__(self, lines: set[int]) -> None:
        super().__init__(echo_backend().engine)
        self.lines = lines
        self.asked: list[int] = []

    def submit(self, requests, watched=frozenset()) -> None:  # type: ignore[no-untyped-def]
        taken = list(requests)
        self.asked += [int(request.id.split(".")[0]) for request in taken]
        super().submit(taken, watched)

    def outputs(self, timeout: float = 0.0) -> News | None:
        news = super().outputs(timeout)
        for output in news.outputs if news is not None else ():
            if int(output.id.split(".")[0]) in self.lines and output.finish is not None:
                output.finish, output.error = Finish.ERROR, "the executor stumbled"
        return news


def retry(
    one: EchoJob,
    backend: InProcess | None = None,
    every: bool = False,
    out: Path | None = None,
    timeout: float | None = None,
) -> int:
    """`shoal retry`, over an engine that hashes."""
    console = Console(file=io.StringIO(), width=400)

    def run(options: JobOptions, again: Again) -> int:
        return run_job(options, backend or echo_backend(), console, again)

    try:
        return retry_job(output_of(out or one.out), every, {}, timeout, run, console)
    finally:
        one.said = console.file.getvalue()  # type: ignore[attr-defined]


class CutOff(Stumbles):
    """The same for a run that is stopped before anything comes back."""

    def outputs(self, timeout: float = 0.0) -> News | None:
        raise KeyboardInterrupt


Jobs = Callable[..., EchoJob]


def test_a_job_with_failures_of_ours_becomes_the_job_without(job: Jobs) -> None:
    whole, one = job(ROWS), job(ROWS)
    assert whole.run() == 3 and one.run(Stumbles({3, 4, 20})) == 3
    assert one.codes() == ["internal", "internal", "invalid_request", "internal"]
    assert [line["x_shoal"]["fault"] for line in one.failures()] == ["ours", "ours", "yours", "ours"]
    before = one.final()
    again = Stumbles(set())
    assert retry(one, again) == 3
    assert sorted(again.asked) == [3, 4, 20], "no other row runs again"
    assert one.final() == whole.final() != before
    assert one.report.problems() == [] and one.report.rows == whole.report.rows
    assert [json.loads(line)["status"] for line in (one.state / "rows.jsonl").read_text().splitlines()].count(
        "ok"
    ) == 24


def test_rows_that_fail_again_stay_failed_and_can_be_tried_once_more(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run(Stumbles({3, 4, 20})) == 3
    assert retry(one, Stumbles({4})) == 3
    assert [line["x_shoal"]["line"] for line in one.failures()] == [4, 13]
    assert retry(one, out=one.state) == 3 and one.codes() == ["invalid_request"], "the state folder names the job too"
    engine = Stumbles(set())
    assert retry(one, engine) == 3 and engine.asked == [] and "0 failed rows" in one.said


def test_with_all_the_lines_own_failures_run_too_and_say_the_same(job: Jobs) -> None:
    one = job(ROWS)
    one.run(Stumbles({5}))
    assert retry(one, every=True) == 3
    assert one.codes() == ["invalid_request"] and one.report.rows.ok == 24


def test_the_errors_file_goes_when_nothing_is_left_in_it(job: Jobs) -> None:
    one = job(ROWS[:12])
    assert one.run(Stumbles({5})) == 3 and one.errors.exists()
    assert retry(one) == 0 and not one.errors.exists()
    assert one.run() == 0 and one.report.files == {str(one.out): 12}


def test_a_retry_that_is_cut_off_goes_on_with_either_command(job: Jobs) -> None:
    whole = job(ROWS)
    whole.run()
    for command in ("retry", "run"):
        one = job(ROWS)
        one.run(Stumbles({3, 4, 20}))
        before = one.final()
        with pytest.raises(KeyboardInterrupt):
            retry(one, CutOff(set()))
        assert one.final() == before, "until it is done both files are those of before"
        assert (retry(one) if command == "retry" else one.run()) == 3
        assert one.final() == whole.final()


@pytest.mark.parametrize("options", [{"order": Order.FINISH}, {"one_file": True}, {"name": "out.csv", "chat": True}])
def test_all_kinds_of_files_are_rewritten(job: Jobs, options: dict[str, object]) -> None:
    rows = [json.dumps({"prompt": f"Question {i}"}) for i in range(9)] if "chat" in options else ROWS
    body = {"body": {"max_tokens": 4}} if "chat" in options else {}
    whole, one = job(rows, **options, **body), job(rows, **options, **body)
    whole.run()
    one.run(Stumbles({2, 7}))
    assert one.final() != whole.final()
    retry(one)
    for ours, theirs in zip(one.final(), whole.final(), strict=True):
        assert sorted(ours.splitlines()) == sorted(theirs.splitlines())
        assert ours == theirs or options.get("order") is Order.FINISH


def test_rows_that_copied_a_failure_are_answered_with_it(job: Jobs) -> None:
    same = [chat(i, "the same", temperature=0) for i in range(9)]
    whole, one = job(same), job(same)
    whole.run()
    one.run(Stumbles({1, 2, 3}))
    assert len(one.codes()) == 9
    engine = Stumbles(set())
    assert retry(one, engine) == 0 and engine.asked == [1] and one.final() == whole.final()


def test_an_errors_file_is_an_input_of_its_own(job: Jobs) -> None:
    one, whole = job(ROWS), job(ROWS)
    whole.run()
    one.run(Stumbles({3, 4, 20}))
    rest = job(one.errors.read_text().splitlines())
    assert rest.run() == 3 and rest.codes() == ["invalid_request"]
    wanted = {line["custom_id"]: line["response"]["body"]["choices"] for line in whole.answers()}
    assert [line["custom_id"] for line in rest.answers()] == ["r2", "r3", "r18"]
    assert all(line["response"]["body"]["choices"] == wanted[line["custom_id"]] for line in rest.answers())


def test_it_works_from_another_folder_and_says_when_there_is_no_job(
    job: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = job(ROWS)
    monkeypatch.chdir(one.root)
    one.run(Stumbles({3}), input=Path("in.jsonl"), output=Path("out.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert retry(one) == 3 and one.codes() == ["invalid_request"]
    assert Path.cwd() == tmp_path
    with pytest.raises(StateError, match="no job has written"):
        retry(one, out=tmp_path / "nothing.jsonl")


def test_a_job_of_a_version_that_did_not_note_its_options_is_refused_with_what_to_do(job: Jobs) -> None:
    one = job(ROWS)
    one.run(Stumbles({3}))
    with closing(sqlite3.connect(one.state / "journal.db")) as database:
        database.execute("DELETE FROM meta WHERE name='job'")
        database.commit()
    with pytest.raises(StateError, match="an earlier version"):
        retry(one)


def test_what_was_read_from_standard_input_runs_again_from_the_state_folder(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(ROWS, input="-")

    class Stdin:
        buffer = io.BytesIO("".join(row + "\n" for row in ROWS).encode())

    monkeypatch.setattr("shoal.jobs.prepare.sys.stdin", Stdin)
    one.run(Stumbles({3}), input=Path("-"))
    assert retry(one) == 3 and one.codes() == ["invalid_request"]
    with View(one.out) as view:
        assert read_note(view).options.input == Path("-"), "a retry leaves the note of the job as it was"


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "longer": lambda text: text + b"mine\n",
    "as long": lambda text: text.replace(b"r2", b"me"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("which", ["out", "errors"])
def test_a_file_that_somebody_has_edited_is_not_written_over(
    job: Jobs, which: str, edit: Callable[[bytes], bytes]
) -> None:
    whole, one = job(ROWS), job(ROWS)
    whole.run()
    one.run(Stumbles({3, 4, 20}))
    path, engine = getattr(one, which), Stumbles(set())
    text = path.read_bytes()
    edited = edit(text)
    path.write_bytes(edited)
    assert edited != text
    with pytest.raises(StateError, match="(?i)bring"):
        retry(one, engine)
    assert path.read_bytes() == edited and engine.asked == []
    path.write_bytes(text)
    assert retry(one) == 3 and one.final() == whole.final(), "nothing was forgotten"


def test_an_edit_of_a_job_that_has_not_ended_is_not_written_over(job: Jobs) -> None:
    one = job([BAD, *ROWS[:5]])
    with pytest.raises(KeyboardInterrupt):
        one.run(CutOff(set()))
    edited = one.errors.read_bytes().replace(b"bad", b"new")
    one.errors.write_bytes(edited)
    with pytest.raises(StateError, match="Bring the file back"):
        retry(one, every=True)
    assert one.errors.read_bytes() == edited


def test_an_edit_made_while_a_retry_was_cut_off_is_not_written_over(job: Jobs) -> None:
    whole, one = job(ROWS), job(ROWS)
    whole.run()
    one.run(Stumbles({3, 4, 20}))
    with pytest.raises(KeyboardInterrupt):
        retry(one, CutOff(set()))
    out, edited = one.out.read_bytes(), one.errors.read_bytes().replace(b"Question", b"My words")
    one.errors.write_bytes(edited)
    with pytest.raises(StateError, match="move it away"):
        retry(one)
    assert one.final() == (out, edited)
    one.errors.rename(one.root / "mine.jsonl")
    assert retry(one) == 3 and one.final() == whole.final()


def test_a_retry_that_may_not_run_forgets_nothing(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    whole, one = job(ROWS), job(ROWS)
    whole.run()
    one.run(Stumbles({3, 4, 20}))
    before = {path.name: path.read_bytes() for path in one.state.iterdir() if path.suffix == ".json"}
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    with pytest.raises(StateError, match="belongs to another job"):
        retry(one)
    assert {name: (one.state / name).read_bytes() for name in before} == before
    assert look_report(one.out).rows.failed == 4
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert retry(one) == 3 and one.final() == whole.final()


def test_rows_that_failed_again_in_a_retry_that_was_killed_while_it_renamed_run_again(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, one = job(ROWS), job(ROWS)
    whole.run()
    one.run(Stumbles({3, 4, 20}))

    def kill(self: DiskFiles, source: Path, target: Path) -> None:
        if target == one.errors:
            raise KeyboardInterrupt
        os.replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DiskFiles, "replace", kill)
        retry(one, Stumbles({4}))
    engine = Stumbles(set())
    assert retry(one, engine) == 3 and engine.asked == [4] and one.final() == whole.final()


# -- the budget ------------------------------------------------------------------------------------


def test_a_share_is_of_all_rows_of_the_file_so_the_first_failures_of_a_large_one_do_not_stop_it(job: Jobs) -> None:
    rows = [BAD.replace("bad", f"bad{i}") for i in range(10)] + [chat(i) for i in range(1000)]
    one = job(rows)
    assert one.run(max_failures=FailureBudget.parse("1%")) == 3, "10 of 1,010 are fewer than 1 %"
    rows.append(BAD.replace("bad", "bad11"))
    assert job(rows).run(max_failures=FailureBudget.parse("1%")) == 4


def test_a_finished_job_is_judged_by_the_budget_of_the_command(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run() == 3
    assert one.run(max_failures=FailureBudget(count=0)) == 4
    assert one.run(max_failures=FailureBudget(count=1)) == 3
