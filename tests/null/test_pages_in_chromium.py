"""What a browser makes of our pages: no complaints, pictures that can be seen, nothing wider than the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from echo_job import ROWS, EchoJob, chat, completion, echo_backend
from test_explain import PRETEND
from test_retry import BAD

from shoal.jobs.options import JobOptions
from shoal.preview import facts
from shoal.preview.command import explain
from shoal.preview.options import ExplainOptions
from shoal.preview.page import page as explain_page
from shoal.show.report_page import page as report_page
from shoal.show.story import tell
from tools.chromium import NAMES, Chromium, find

WIDTHS = (1280, 400)
LONG_WORD = "anotherverylongwordwithoutanyspace" * 9
ROWS_OF_ALL_KINDS = [
    *ROWS[:50], BAD, *(chat(i, "a river and a fish " * 30 + str(i % 40), temperature=0) for i in range(200, 260)),
    *(completion(i, f"{LONG_WORD} {i}", max_tokens=200, ignore_eos=True) for i in range(300, 310)), "{",
    completion(400, LONG_WORD, **{LONG_WORD[:200]: 1}),
]  # fmt: skip

OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
STICKS_OUT = """[...document.querySelectorAll('body *')].filter(e => {
  const inner = e.parentElement.closest('svg');
  const box = e.getBoundingClientRect();
  return !inner && box.width > 0 && (box.right > window.innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + ': ' + e.textContent.slice(0, 40))"""
PICTURES = """[...document.querySelectorAll('section svg[role=img]')].map(picture => {
  const drawn = [...picture.querySelectorAll('rect, path')].filter(shape => {
    const box = shape.getBoundingClientRect(), style = getComputedStyle(shape);
    return box.width * box.height > 1 && style.fill !== 'none' && style.fill !== 'rgba(0, 0, 0, 0)';
  });
  return [picture.getAttribute('aria-label'), picture.getBoundingClientRect().width, drawn.length];
})"""
LETTERS = """[...document.querySelectorAll('p, td, th, svg text, span, b, dd')].map(
  e => parseFloat(getComputedStyle(e).fontSize))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = find()
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)}")
    with Chromium(program) as found:
        yield found


@pytest.fixture
def pages(job: Callable[..., EchoJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(facts, "measured", lambda *_: PRETEND)
    one = job(ROWS_OF_ALL_KINDS)
    assert one.run(echo_backend(200)) == 3
    options = JobOptions(input=one.root / "in.jsonl", output=tmp_path / "nothing")
    texts = {
        "explain": explain_page(explain(ExplainOptions(options, price=2.0, watts=90.0))),
        "report": report_page(tell(one.out, price=2.0, watts=90.0)),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: tmp_path / f"{name}.html" for name in texts}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_whole_at_this_width(browser: Chromium, pages: dict[str, Path], width: int, dark: bool) -> None:
    least = {"explain": 3, "report": 7}
    for name, path in pages.items():
        browser.open(path, width, dark=dark)
        assert browser.complaints() == []
        assert browser.see("window.innerWidth") == width
        assert browser.see(OVERFLOW) <= 0 and browser.see(STICKS_OUT) == []
        pictures = browser.see(PICTURES)
        assert len(pictures) >= least[name]
        assert all(wide > 0.4 * min(width, 900) / 2 and drawn for _, wide, drawn in pictures), pictures
        assert min(browser.see(LETTERS)) >= 12


def test_a_browser_s_complaints_are_heard(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<!DOCTYPE html><body style='margin:0'><div style='width:2000px'>wide</div><img src='nothing.png'>"
        "<script>undefined.name</script><section><svg role='img' aria-label='empty'></svg></section>"
    )
    browser.open(path, 400)
    said = " ".join(browser.complaints())
    assert "TypeError" in said and "ERR_FILE_NOT_FOUND" in said
    assert browser.see(OVERFLOW) > 1000 and browser.see(STICKS_OUT) and browser.see(PICTURES)[0][2] == 0
