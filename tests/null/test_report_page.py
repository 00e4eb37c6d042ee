"""The report's page tells a job whole, whatever became of it, from its state folder alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from echo_job import ROWS, EchoJob, Watched, chat, completion, echo_backend, interrupt
from test_cli import call
from test_live_report import broken_at, meta
from test_retry import BAD
from whole_job import SteppingClock

from shoal.core.errors import StateError
from shoal.jobs.report import Slow
from shoal.jobs.timeline import Timeline
from shoal.show.report_page import page
from shoal.show.story import tell
from shoal.text.checkpoint import EMBEDDED

Jobs = Callable[..., EchoJob]
HOSTILE = completion(900, "<script>alert('&')</script>\x01\ud800" * 9, max_tokens=3)
SHARED = [chat(i, "a river and a fish " * 30 + str(i % 40), temperature=0) for i in range(200, 260)]


def parsed(text: str) -> ElementTree.Element:
    """A page is well-formed, has no scripts, and asks for nothing."""
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert "script" not in {element.tag for element in tree.iter()}
    assert not re.search(r"(?:src|href)\s*=|url\s*\(|@import|https?:", text)
    return tree


def words(text: str) -> str:
    return " ".join("".join(parsed(text).itertext()).split())


def made(job: Jobs) -> EchoJob:
    one = job([*ROWS[:60], *SHARED, BAD, HOSTILE.replace("\\ud800", "")])
    assert one.run(echo_backend(64)) == 3
    return one


def test_the_page_has_every_part_and_the_report_s_numbers(job: Jobs) -> None:
    one = made(job)
    text = page(tell(one.out, price=3600.0, watts=1000.0))
    said, report = words(text), one.report
    for part in ("Rows", "What became of the prompt tokens", "While it ran", "Slowest rows", "Shared prefixes"):
        assert f"<h2>{part}</h2>" in text
    assert f"{report.rows.ok}of {report.rows.total}, {report.rows.failed} failed" in said
    assert f"{report.tokens.prompt_recomputed:,} computed again" in said or not report.tokens.prompt_recomputed
    assert f"{report.reused.duplicates} equal to an earlier row" in said and report.reused.duplicates == 20
    assert "invalid_request" in said or next(iter(report.errors)) in said
    assert "a river and a fish" in said and "smaller ones together" in said
    assert f"{report.seconds.wall:.4g}" in said and "kWh" in said
    assert len(list(parsed(text).iter("svg"))) > 8


def test_prompt_tokens_on_the_page_add_up_to_all_there_are(job: Jobs) -> None:
    for one in (made(job), job(ROWS)):
        one.run()
        report = tell(one.out).report
        text = page(tell(one.out))
        bar = next(e for e in parsed(text).iter("svg") if e.get("aria-label") == "Prompt tokens by what became of them")
        named = {e.text.split(" ", 1)[1]: int(e.text.split()[0].replace(",", "")) for e in bar.iter("title") if e.text}
        again = named.pop("computed again")
        assert sum(named.values()) == report.tokens.prompt and again == report.tokens.prompt_recomputed
        assert sum(float(e.get("width", "0%").rstrip("%")) for e in bar.iter("rect")) == pytest.approx(100, abs=0.01)


def test_of_a_job_that_was_killed_and_of_one_that_runs(job: Jobs) -> None:
    one, pages = job(ROWS), list[str]()

    def look(rounds: int) -> None:
        if rounds in (5, 40):
            pages.append(page(tell(one.out)))

    with pytest.raises(KeyboardInterrupt), mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(30)))
    assert "not finished" in words(page(tell(one.out))) and "still to compute" in page(tell(one.out))
    with mock.patch("shoal.jobs.run.WallClock", SteppingClock):
        one.run(Watched(echo_backend(tokens=64, sequences=8), look))
    assert len(pages) == 2 and "running" in words(pages[-1]) and "Still to do" in pages[-1]
    assert "a run began anew" in page(tell(one.out))


def test_counts_that_do_not_add_up_come_first_and_loud(job: Jobs, tmp_path: Path) -> None:
    one = made(job)
    meta(one, "DELETE FROM results WHERE line IN (2, 5)")
    html = tmp_path / "page.html"
    assert call("report", str(one.out), "--html", str(html)) == 1
    text = html.read_text()
    assert text.index('class="loud"') < text.index('class="tiles"') and "do not add up" in text


def test_the_command_writes_the_page_and_json_has_bill_and_time_line(
    job: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, html = made(job), tmp_path / "page.html"
    rates = ["--price-per-hour", "2", "--watts", "90"]
    assert call("report", str(one.state), "--html", str(html), *rates) == 0
    assert parsed(html.read_text()) is not None
    assert "kWh" in capsys.readouterr().out
    assert call("report", str(one.out), "--json", *rates) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bill"]["cost"][0] == pytest.approx(found["seconds"]["wall"] / 1800)
    assert sum(found["timeline"]["prompt"]) > 0 and found["problems"] == []
    assert call("report", str(one.out), "--watts", "-1") == 2


def test_in_another_place_all_but_the_texts_is_there(job: Jobs, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model, ignore=shutil.ignore_patterns("*.safetensors"))
    one = job(SHARED, model=str(model))
    assert one.run() == 0
    (model / "tokenizer_config.json").write_text("{}")
    assert "no longer the one" in page(tell(one.out))
    shutil.rmtree(model)
    text = page(tell(one.out))
    assert "is not on this machine" in text and "tokenizer is not here" in text and "saves" in text
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    shutil.copytree(one.root, tmp_path / "elsewhere")
    assert page(tell(tmp_path / "elsewhere" / one.name)).count("<svg") == text.count("<svg")


def test_a_damaged_plan_costs_the_tree_and_nothing_else(job: Jobs) -> None:
    one = made(job)
    (one.state / "units.npy").write_bytes(b"x")
    assert "its checksum differs" in page(tell(one.out))
    (one.state / "plan.json").unlink()
    assert "there is no finished plan" in page(tell(one.out))


def test_a_job_of_before_there_were_time_lines_has_a_page(job: Jobs) -> None:
    one = made(job)
    meta(one, "DELETE FROM meta WHERE name IN ('pulse', 'timeline')")
    assert "kept no time line" in page(tell(one.out))
    meta(one, "INSERT INTO meta VALUES ('timeline', '[]')")
    with pytest.raises(StateError, match="another version"):
        tell(one.out)
    for path in one.state.glob("journal.db*"):
        path.unlink()
    assert "kept no time line" in page(tell(one.out))


def test_the_slowest_rows_are_drawn_to_one_scale(job: Jobs) -> None:
    story = tell(made(job).out)
    rows = [Slow(7, 1.0, 2.0, 6.0, 10, 20), Slow(8, 0.0, 0.0, 4.0, 10, 20, preemptions=2)]
    text = page(replace(story, report=replace(story.report, slowest=rows)))
    bars = [e for e in parsed(text).iter("svg") if str(e.get("aria-label")).startswith("Slowest rows")]
    wide = [float(e.get("width", "").rstrip("%")) for bar in bars for e in bar.iter("rect")]
    assert wide == [25, 75, 0, 50]
    assert "put off 2 times" in text and "after 1.0 s in the queue" in text


def test_a_long_time_line_is_drawn_with_few_columns(job: Jobs) -> None:
    story = tell(made(job).out)
    line = Timeline(prompt=[5.0] * 470, output=[1.0] * 470, kv=[0.5] * 470, running=[3] * 470, begins=[100.0])
    text = page(replace(story, timeline=line))
    assert len(text) < 100_000 and "stroke-dasharray" in text


def test_interrupted_it_says_so(job: Jobs) -> None:
    one = job(ROWS)
    assert one.run(Watched(echo_backend(tokens=64), interrupt(12))) == 5
    assert "not finished" in words(page(tell(one.out)))
