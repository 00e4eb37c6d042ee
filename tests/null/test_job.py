"""The main job over the real scheduler, without a model: exit codes, going on, engines that die."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from echo_job import ROWS, Mortal, Watched, chat, completion, echo_backend, interrupt
from faulty import FaultyFiles

from shoal.client import News
from shoal.core.errors import ShoalError, StateError, UsageError
from shoal.jobs.options import FailureBudget, Order
from shoal.jobs.state import open_state

MINNOW = Path(__file__).parents[2] / "shoal" / "models" / "minnow"


# -- what is left ----------------------------------------------------------------------------------


def test_the_state_folder_and_the_report_hold_what_was_promised(job) -> None:
    one = job([*ROWS[:30], "broken", "", chat(99, "word " * 9000)])
    assert one.run() == 3
    names = {path.name for path in one.state.iterdir()}
    assert names >= {"journal.db", "report.json", "manifest.json", "steps.jsonl", "rows.jsonl"}
    report = json.loads((one.state / "report.json").read_text())
    assert report["rows"] == {"total": 32, "ok": 30, "failed": 2, "expired": 0, "cancelled": 0}
    assert set(report["tokens"]) >= {"prompt", "prompt_bound", "prompt_computed", "prompt_recomputed", "output"}
    assert set(report["seconds"]) == {"wall", "cpu", "load", "plan"}
    assert report["steps"] == len((one.state / "steps.jsonl").read_text().splitlines()) > 0
    assert report["peak_memory_bytes"] > 0 and "shoal" in report["versions"]
    usage = [line["response"]["body"]["usage"] for line in one.answers()]
    assert report["tokens"]["output"] == sum(part["completion_tokens"] for part in usage)
    rows = [json.loads(line) for line in (one.state / "rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [*range(1, 32), 33]
    assert json.loads((one.state / "manifest.json").read_text())["weight_mode"] == "bf16"


@pytest.mark.parametrize(
    ("rows", "code", "counts"),
    [([], 0, (0, 0)), (["", "  "], 0, (0, 0)), (["{", "no"], 3, (0, 2)), ([chat(1)], 0, (1, 0))],
    ids=["empty", "blank", "bad", "one"],
)
def test_small_files_end_like_large_ones(job, rows: list[str], code: int, counts: tuple[int, int]) -> None:
    one = job(rows)
    assert one.run() == code
    assert (len(one.answers()), len(one.failures())) == counts
    assert (one.report.rows.ok, one.report.rows.failed) == counts and one.report.finished


def test_a_finished_job_says_so_and_ends_as_before(job) -> None:
    one = job([*ROWS[:5], "broken"])
    assert one.run() == 3
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend) == 3
    assert backend.rounds == 0 and "had ended before" in one.said and "5 ok" in one.said
    (one.state / "report.json").unlink()
    assert one.run(backend) == 3 and backend.rounds == 0 and one.report.rows.ok == 5


def test_rows_that_name_another_model_are_answered_with_one_warning(job) -> None:
    one = job([chat(i) for i in range(3)])
    assert one.run() == 0
    assert one.said.count("rows name the model 'any'") == 1


def test_an_empty_answer_is_written_with_a_full_row_beside_it(job) -> None:
    """Rows whose prompt is all there is: echo without a token, several prompts, several samples."""
    rows = [
        completion(0, "Once upon a time", echo=True, max_tokens=0, prompt_logprobs=0),
        completion(1, ["Once upon", "a time", "Once upon a time"], n=2, temperature=0.7),
        chat(2, "the same", n=3, temperature=1.0, seed=4),
        chat(3, "the same", n=3, temperature=1.0, seed=4),
    ]
    one = job(rows)
    assert one.run() == 0
    first, second, third, fourth = [line["response"]["body"]["choices"] for line in one.answers()]
    assert first[0]["text"] == "Once upon a time" and len(first[0]["prompt_logprobs"]) > 1
    assert len(second) == 6 and [choice["index"] for choice in second] == list(range(6))
    assert third == fourth


# -- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_ends_with_1_and_the_job_goes_on(job, unbroken, code: int) -> None:
    for at in (0, 6, 9, 14, 20, 27):
        one = job(ROWS)
        with mock.patch("shoal.jobs.run.DiskFiles", lambda at=at: FaultyFiles(at, code)):
            with pytest.raises(ShoalError) as caught:
                one.run()
        assert caught.value.exit_code == 1
        assert one.run() == 0 and one.final() == unbroken


def test_no_room_for_the_log_of_steps_is_said(job) -> None:
    one = job(ROWS)
    opened = Path.open
    with mock.patch.object(
        Path, "open", lambda p, *a, **k: opened(Path("/dev/full") if p.name == "steps.jsonl" else p, *a, **k)
    ):
        with pytest.raises(ShoalError, match="no room left"):
            one.run()
    assert one.run() == 0


def test_another_job_is_refused_by_name(job) -> None:
    one = job(ROWS[:4])
    one.run()
    for change, named in [
        ({"seed": 3}, "parameters seed was 0, is 3"),
        ({"body": {"temperature": 0.5}}, "parameters body temperature was absent, is 0.5"),
        ({"order": Order.FINISH}, "order was plan, is finish"),
        ({"weights": "fp32"}, "weight_mode was bf16, is fp32"),
        ({"kv": "int8"}, "kv_mode was bf16, is int8"),
        ({"prompt": "{text}"}, "parameters prompt was absent, is {text}"),
        ({"model": str(MINNOW)}, "parameters model was minnow, is "),
    ]:
        with pytest.raises(StateError, match="--restart, or choose another output") as caught:
            one.run(**change)
        assert named in str(caught.value) and caught.value.exit_code == 2
    with mock.patch.dict(os.environ, SOURCE_DATE_EPOCH="1700000000"):
        with pytest.raises(StateError, match="parameters created was 0, is 1700000000"):
            one.run()
    assert one.run(memory=10**9, threads=2) == 0
    (one.root / "in.jsonl").write_text(chat(1) + "\n")
    with pytest.raises(StateError, match="input was"):
        one.run()


def test_a_second_run_is_told_who_works(job) -> None:
    one = job(ROWS[:4])
    (one.root / "in.jsonl").write_text(ROWS[0] + "\n")
    with open_state(one.out, None, FaultyFiles()), pytest.raises(StateError, match=f"process {os.getpid()}"):
        one.run()


def test_an_input_is_never_written_over(job) -> None:
    """Not even with --overwrite or --restart, and not as the file of failed lines."""
    one = job(ROWS[:4])
    one.run()
    for option in ({"overwrite": True}, {"restart": True}, {}):
        for output in ("in.jsonl", "../job1/./in.jsonl"):
            with pytest.raises(UsageError, match="is the input"):
                one.run(output=one.root / output, **option)
    (one.root / "x.errors.jsonl").write_text(ROWS[0])
    with pytest.raises(UsageError, match="is the input"):
        one.run(input=one.root / "x.errors.jsonl", output=one.root / "x.jsonl", overwrite=True)


def test_an_input_that_is_not_there_costs_nothing(job) -> None:
    one = job(ROWS[:4])
    one.run()
    before = one.final()
    os.mkfifo(one.root / "pipe")
    for name, said in [("nothing.jsonl", "cannot read"), (".", "is not a file"), ("pipe", "is read with --input -")]:
        with pytest.raises(UsageError, match=said):
            one.run(input=one.root / name, restart=True)
    assert one.final() == before


def test_an_input_cut_short_meanwhile_is_named(job) -> None:
    one = job([chat(i) for i in range(1500)])
    cut = Watched(echo_backend(), lambda rounds: (one.root / "in.jsonl").write_text("") and None)
    with pytest.raises(StateError, match="of the input is not what it was"):
        one.run(cut)


@pytest.mark.parametrize("budget", ["5", "5%"])
def test_bad_lines_beyond_the_budget_cost_no_engine(job, budget: str) -> None:
    one = job(["broken"] * 10 + ROWS[:90])
    backend = Watched(echo_backend(), lambda rounds: None)
    assert one.run(backend, max_failures=FailureBudget.parse(budget)) == 4
    assert backend.rounds == 0 and not one.report.finished
    assert one.run(max_failures=FailureBudget.parse("10%")) == 3 and len(one.answers()) == 90


def test_a_budget_hit_ends_the_job_early_and_it_goes_on_with_a_larger_one(job) -> None:
    rows = [chat(i, "word " * 300 if i % 3 == 0 else None) for i in range(600)]
    one = job(rows, order=Order.INPUT)
    assert one.run(echo_backend(12), max_failures=FailureBudget(count=20)) == 4
    assert not one.report.finished and one.report.rows.ended < 600
    assert one.run(echo_backend(12)) == 3
    assert one.report.rows.failed == 200 and one.report.runs == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_goes_on_to_the_same_bytes(job, unbroken, number: int) -> None:
    one = job(ROWS)
    backend = Watched(echo_backend(), interrupt(12, number))
    assert one.run(backend) == 5
    assert backend.rounds == 13, "the step under way is finished, and no other"
    first = one.report
    assert not first.finished and first.exit_code == 5 and first.rows.failed == 0
    assert 0 < first.rows.ok < 120
    assert one.run() == 0 and one.final() == unbroken
    last = one.report
    assert last.runs == 2 and last.steps > first.steps and last.seconds.wall > first.seconds.wall
    assert last.tokens.prompt_computed == last.tokens.prompt_bound + last.tokens.prompt_recomputed


@pytest.fixture
def interruptible():
    """SIGINT as a terminal gives it: whoever starts us in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_does_not_wait(job, unbroken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.run.LAST_STEP", 600.0)  # on a busy machine two seconds may pass without a step
    one = job(ROWS)
    with pytest.raises(KeyboardInterrupt):
        one.run(Watched(echo_backend(), lambda rounds: signal.raise_signal(signal.SIGINT) if rounds > 9 else None))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert one.run() == 0 and one.final() == unbroken


def test_a_signal_while_the_engine_loads_ends_the_job(job) -> None:
    class Slow(Mortal):
        def ready(self, timeout: float) -> None:
            signal.raise_signal(signal.SIGTERM)

    class Torn(Mortal):
        """The signal has reached the engine as well."""

        def dies_loading(self) -> bool:
            signal.raise_signal(signal.SIGTERM)
            return True

    for process in (Slow, Torn):
        one = job(ROWS)
        assert one.run_mortal(process) == 5 and process.made == 1
        assert one.run() == 0


# -- engines that die ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_rows_of_a_dead_engine_run_again(job, unbroken, at: int) -> None:
    class Once(Mortal):
        def dies(self, running: set[int]) -> bool:
            return self.number == 1 and self.rounds == at

    one = job(ROWS)
    assert one.run_mortal(Once) == 0
    assert Once.made == 2 and one.report.engine_restarts == 1
    assert one.final() == unbroken


@pytest.mark.parametrize("deadly", [{1}, {8}, {120}, {8, 9}, {4, 60, 101}])
def test_a_row_that_kills_its_engine_is_found_and_its_neighbours_are_fine(job, unbroken, deadly: set[int]) -> None:
    class Killed(Mortal):
        def dies(self, running: set[int]) -> bool:
            return bool(running & deadly)

    one = job(ROWS)
    assert one.run_mortal(Killed) == 3
    assert one.codes() == ["engine_died"] * len(deadly)
    assert [line["x_shoal"]["line"] for line in one.failures()] == sorted(deadly)
    fine = [line for number, line in enumerate(unbroken[0].splitlines(), 1) if number not in deadly]
    assert one.out.read_bytes().splitlines() == fine
    assert Killed.made <= 1 + 6 * len(deadly)


def test_a_step_that_takes_very_long_is_said_and_the_engine_is_left_alone(job, unbroken, monkeypatch) -> None:
    class Stuck(Mortal):
        def outputs(self, timeout: float) -> News | None:
            if self.rounds == 3 and time.monotonic() < until:
                time.sleep(0.01)
                return None
            return super().outputs(timeout)

    monkeypatch.setattr("shoal.jobs.patience.LEAST", 0.2)
    monkeypatch.setattr("shoal.jobs.patience.TIMES", 0)
    until = time.monotonic() + 2.0
    one = job(ROWS, quiet=True)
    assert one.run_mortal(Stuck) == 0 and one.final() == unbroken
    assert 1 <= one.said.count("the engine's present step has run for") <= 4
    assert f"wait, or end process {os.getpid()}" in one.said
    assert Stuck.made == 1


@pytest.mark.parametrize("loads", [1, 2])
def test_an_engine_that_dies_while_it_loads_is_started_again(job, unbroken, loads: int) -> None:
    class Late(Mortal):
        def dies_loading(self) -> bool:
            return self.number <= loads

    one = job(ROWS)
    assert one.run_mortal(Late) == 0 and one.final() == unbroken


def test_engines_that_keep_dying_end_the_job_and_it_goes_on(job, unbroken) -> None:
    class Unborn(Mortal):
        def dies_loading(self) -> bool:
            return True

    class Short(Mortal):
        def dies(self, running: set[int]) -> bool:
            return True

    one = job(ROWS)
    with pytest.raises(ShoalError, match="while it loaded the model, 3 times") as caught:
        one.run_mortal(Unborn)
    assert caught.value.exit_code == 1 and Unborn.made == 3
    assert one.run() == 0 and one.final() == unbroken
    two = job(ROWS)
    with pytest.raises(ShoalError, match="8 times without completing a row"):
        two.run_mortal(Short)
    assert two.run() in (0, 3) and two.report.rows.ended == 120
