"""What files, rows and servers say is shown to people and never obeyed by their terminals."""

from __future__ import annotations

import ast
import io
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest
from echo_job import ROWS, EchoJob
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli import call
from test_layers import modules

from shoal.core.clock import SimClock
from shoal.core.errors import UsageError
from shoal.core.printable import printable
from shoal.flags import exit_codes
from shoal.jobs.display import Display
from shoal.jobs.report import Failures
from shoal.jobs.report_words import print_report
from shoal.show.page import printable as page_words
from shoal.show.top import run_top

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\ud83d"


def screen() -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=300)


def seen(console: Console) -> str:
    """What has come to the screen; it has to be text, and no more than text in lines."""
    console.file.flush()
    text = console.file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert isinstance(text, str) and harmless(text), repr(text)
    return text


def harmless(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text.replace("\n", ""))


@given(st.text(st.characters()) | st.text("\x00\x1b\t\n\r\x7f\x80\x9b\xa0a\ud800\udfff\uffff€😀"))
def test_every_sign_that_is_shown_stays_and_no_other(text: str) -> None:
    for lines in (False, True):
        clean = printable(text, lines)
        clean.encode()
        assert harmless(clean)
        for before, after in zip(text, clean, strict=True):
            kept = unicodedata.category(before) not in ("Cc", "Cs") and before not in "\ufffe\uffff"
            assert after == (before if kept or (lines and before == "\n") else "\ufffd")
    page_words(text).encode()
    assert harmless(page_words(text)) and "\n" not in page_words(text)


def test_neither_a_row_nor_the_name_of_a_file_can_say_what_a_terminal_obeys(
    job: Callable[..., EchoJob], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    fault = json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions",
                        "body": {"messages": [{"role": "user", "content": "a"}], NASTY[:-1]: 1}})  # fmt: skip
    one = job([*ROWS[:3], fault, json.dumps({NASTY[:-1]: 1}), json.dumps(NASTY)], name=f"{NASTY[:-1]}.jsonl")
    assert one.run() == 3
    assert (
        call("lint", str(one.root / "in.jsonl")) == 3
        and call("report", str(one.out)) == 0
        and call("top", str(one.out)) == 0
    )
    console = screen()
    run_top(one.out, True, console)
    print_report(one.report, console)
    captured = capfdbinary.readouterr()
    for text in (captured.out.decode(), captured.err.decode(), seen(console)):
        assert harmless(text), repr(text)
        assert "owned" in text or text == captured.err.decode()


def test_nor_can_a_server_a_path_or_a_warning() -> None:
    from test_report import GOOD

    console = screen()
    print_report(replace(GOOD, files={f"/tmp/{NASTY}": 7}, errors={NASTY: Failures(3, 1, NASTY)}, model=NASTY), console)
    with Display(console, SimClock()) as display:
        display.note(f"a {NASTY}\nb")
        display.warn(NASTY)
    assert seen(console).count("owned") == 6 and "\nb\n" in seen(console)


def test_nor_can_an_error_that_ends_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException) as end, exit_codes():  # noqa: PT011
        raise UsageError(f"no file {NASTY}\nsay another")
    assert type(end.value).__name__ == "Exit"
    text = capfd.readouterr().err
    assert harmless(text) and "owned" in text and text.endswith("\nsay another\n")


def test_nothing_else_makes_texts_for_a_terminal() -> None:
    makers: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Text":
                makers.setdefault(path.name, []).append(ast.unparse(node))
    assert list(makers) == ["terminal.py"]
