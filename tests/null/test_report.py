"""The report adds up or says so; the display tells the truth at the pace it promises."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.core.clock import SimClock
from shoal.core.errors import ShoalError, StateError
from shoal.jobs.display import PLAIN_EVERY, Display, PlanFacts, Progress, Rates, Window, plain_line
from shoal.jobs.files import DiskFiles
from shoal.jobs.report import Failures, Report, Rows, Seconds, Tokens, read_report, to_json, write_report
from shoal.jobs.report_words import print_report, prompt_line
from shoal.jobs.state import folder_of
from shoal.jobs.units import count, duration, percent, size

GOOD = Report(
    rows=Rows(total=10, ok=7, failed=2, expired=1),
    tokens=Tokens(prompt=1000, prompt_bound=400, prompt_computed=450, prompt_recomputed=50, prompt_last=3, output=80),
    seconds=Seconds(wall=12.0, cpu=20.0, load=1.0, plan=1.0),
    steps=33,
    peak_memory_bytes=3_500_000_000,
    versions={"shoal": "0.1.0"},
    files={"o.jsonl": 7, "o.errors.jsonl": 3},
    errors={
        "invalid_json_line": Failures(1, 4, "line 4 is not JSON"),
        "context_length_exceeded": Failures(1, 9, "needs 9,000 tokens of 2,048"),
        "batch_expired": Failures(1, 10, "too late"),
    },
    exit_code=3,
)


def printed(report: Report, width: int = 200) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_a_report_that_adds_up_keeps_its_exit_code() -> None:
    assert GOOD.problems() == []
    assert GOOD.status == 3


@given(st.tuples(*[st.integers(0, 5)] * 5))
def test_counts_that_do_not_add_up_are_never_silent(numbers: tuple[int, ...]) -> None:
    report = Report(rows=Rows(*numbers), errors={"x": Failures(numbers[0] - numbers[1], 1, "x")})
    adds_up = numbers[0] == sum(numbers[1:])
    assert (report.problems() == []) == adds_up
    assert (report.status == 1) != adds_up
    assert ("DO NOT ADD UP" in printed(report)) != adds_up


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, tokens=replace(GOOD.tokens, prompt_bound=1001)),
        replace(GOOD, tokens=replace(GOOD.tokens, prompt_recomputed=451)),
        replace(GOOD, errors={}),
    ],
)
def test_other_contradictions_are_problems_too(wrong: Report) -> None:
    assert wrong.problems() and wrong.status == 1


def test_an_unfinished_job_may_have_rows_left() -> None:
    report = replace(GOOD, rows=Rows(total=100, ok=5), finished=False, exit_code=5)
    assert report.status == 5
    assert "95 not ended" in printed(report) and "continues" in printed(report)


def test_the_text_names_what_people_ask_for() -> None:
    text = printed(GOOD)
    for words in (
        "10 rows: 7 ok, 2 failed, 1 expired",
        "1,000 in, 450 computed: shared prefixes saved 550 (55 %) of the 600",
        "50 computed again for want of memory",
        "108 tokens/s",
        "3.5 GB",
        "line 4 is not JSON",
        "o.errors.jsonl: 3 lines",
    ):
        assert words in text


def test_rows_that_were_not_computed_are_no_saving() -> None:
    """A row that failed for want of memory, or has not ended, has cost nothing: no prefix has saved that."""
    whole = prompt_line(Tokens(prompt=1000, prompt_bound=600, prompt_computed=600))
    assert (
        whole == "1,000 in, 600 computed: shared prefixes saved 400 (40 %) of the 400 that a memory without limit would"
    )
    killed = prompt_line(Tokens(prompt=1000, prompt_bound=600, prompt_computed=250))
    assert killed == "1,000 in, 250 computed of at least 600: the others are of rows that failed or have not ended"


def test_the_largest_group_of_errors_comes_first() -> None:
    errors = {"a": Failures(1, 1, "one"), "b": Failures(2, 2, "two")}
    text = printed(Report(rows=Rows(total=3, failed=3), errors=errors))
    assert text.index("two") < text.index("one")


def test_messages_are_text_and_never_markup() -> None:
    errors = {"a": Failures(1, 1, "[bold]x[/nonsense]")}
    assert "[bold]x[/nonsense]" in printed(Report(rows=Rows(total=1, failed=1), errors=errors))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with pytest.raises(StateError, match="no job"):
        read_report(output)
    folder = folder_of(output)
    folder.mkdir()
    with pytest.raises(StateError, match="has not ended"):
        read_report(output)
    write_report(GOOD, folder, DiskFiles())
    assert read_report(output) == GOOD
    (folder / "report.json").write_bytes(b"{")
    with pytest.raises(ShoalError, match="not a report"):
        read_report(output)


def test_json_holds_every_field_and_the_problems() -> None:
    fields = msgspec.json.decode(to_json(replace(GOOD, errors={})))
    assert fields["tokens"]["prompt_recomputed"] == 50
    assert fields["rows"] == {"total": 10, "ok": 7, "failed": 2, "expired": 1, "cancelled": 0}
    assert set(fields["seconds"]) == {"wall", "cpu", "load", "plan"}
    assert {"steps", "peak_memory_bytes", "versions"} <= set(fields)
    assert len(fields["problems"]) == 1


def test_units_are_what_people_read() -> None:
    assert [duration(s) for s in (0.04, 3.3, 59.7, 3599.7, 7325, math.inf)] == [
        "0.0 s", "3.3 s", "1 min 0 s", "1 h 0 min", "2 h 2 min", "?",
    ]  # fmt: skip
    assert [size(b) for b in (5, 1500, 2.5e9, 1e12)] == ["5 B", "1.5 kB", "2.5 GB", "1.0 TB"]
    assert [percent(1, 3), percent(0, 0), percent(1, 30)] == ["33 %", "0 %", "3.3 %"]
    assert count(1234567.4) == "1,234,567"


def at(work: int, total: int = 1000) -> Progress:
    return Progress(
        rows_total=10, rows_done=work // 100, tokens_in=work // 2, tokens_out=work // 2, work_done=work,
        work_left=total - work,
    )  # fmt: skip


def test_time_left_comes_from_tokens() -> None:
    window = Window(seconds=10)
    assert window.add(0.0, at(0)) == Rates(0, 0, math.inf)
    assert window.add(5.0, at(100)) == Rates(10, 10, 45.0)


def test_rates_forget_what_left_the_window() -> None:
    window = Window(seconds=10)
    for second in range(100):
        rates = window.add(float(second), at(second * 10 if second < 50 else 500 + (second - 50) * 2))
    assert rates == Rates(1, 1, pytest.approx((1000 - 598) / 2))


def test_a_job_that_stands_still_promises_nothing() -> None:
    window = Window()
    window.add(0.0, at(100))
    assert window.add(1.0, at(100)).seconds_left == math.inf
    assert window.add(2.0, at(1000)).seconds_left == 0.0
    assert window.add(3.0, replace(at(1000), work_left=None)).seconds_left == math.inf


def test_a_line_says_all_of_it() -> None:
    progress = Progress(
        rows_total=1000, rows_done=600, rows_failed=2, rows_written=590, waiting_for=591, tokens_in=1000,
        tokens_out=50, tokens_saved=780, work_done=270, work_left=100, kv_used=10**9, kv_total=4 * 10**9,
    )  # fmt: skip
    assert plain_line(progress, Rates(1200, 300, 61)) == (
        "600/1,000 rows, 2 failed, 590 written (waiting for line 591); 1,200 tokens/s in, 300 out, "
        "780 prompt tokens saved (78 %); memory 1.0 GB of 4.0 GB; 1 min 1 s left"
    )


def run_display(console: Console, quiet: bool = False) -> None:
    clock = SimClock()
    with Display(console, clock, quiet=quiet) as display:
        display.plan(PlanFacts("in.jsonl", "tiny", 10, 1, 1000, 400, 10**9, 5000, 0.5))
        for tenth in range(1000):
            clock.advance_to(tenth / 10)
            display.show(at(tenth))
        display.show(at(1000), last=True)
        display.warn("the engine died and was started again")


def test_without_a_terminal_a_line_comes_every_few_seconds() -> None:
    out = io.StringIO()
    run_display(Console(file=out, width=40))
    lines = [line for line in out.getvalue().splitlines() if "tokens/s" in line]
    assert len(lines) == 100 / PLAIN_EVERY + 1
    assert "10/10 rows" in lines[-1] and "0.0 s left" in lines[-1]
    assert "\x1b" not in out.getvalue()
    assert "60 % shared" in out.getvalue()


def test_a_large_input_shows_how_far_it_is_read() -> None:
    for terminal in (False, True):
        out, clock = io.StringIO(), SimClock()
        display = Display(Console(file=out, width=100, force_terminal=terminal, _environ={}), clock)
        with display:
            for tenth in range(120):
                clock.advance_to(tenth / 10)
                display.reading(2048 * tenth, tenth, 200)
                assert out.getvalue() or tenth < 10 * PLAIN_EVERY
        assert terminal == ("\x1b[" in out.getvalue()) and "rows, 50 % of the input" in out.getvalue()
        if not terminal:
            assert out.getvalue().splitlines()[-1] == "reading and planning: 204,800 rows, 50 % of the input"
            assert out.getvalue().count("\n") == 2


def test_a_terminal_gets_a_picture_in_place() -> None:
    out = io.StringIO()
    run_display(Console(file=out, width=100, force_terminal=True, color_system="standard", _environ={}))
    assert "\x1b[" in out.getvalue() and "10/10 rows" in out.getvalue()


def test_no_color_is_honoured() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system="standard", _environ={"NO_COLOR": "1"})
    run_display(console)
    assert not any(f"\x1b[{code}" in out.getvalue() for code in (31, 32, 33, 34, 35, 36, 38))
    assert "10/10 rows" in out.getvalue()


def test_quiet_leaves_warnings_alone() -> None:
    out = io.StringIO()
    run_display(Console(file=out, width=100), quiet=True)
    assert out.getvalue() == "warning: the engine died and was started again\n"
