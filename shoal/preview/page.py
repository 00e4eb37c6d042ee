"""An explanation as one HTML page: no scripts, nothing from elsewhere, pictures as SVG that grows with the page.

It must not know where its numbers come from. Widths in pictures are shares of the page, heights and letters are not:
so they can be read on a telephone too.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from shoal.jobs.units import count
from shoal.preview.facts import Explanation, Lengths
from shoal.preview.prefixes import Prefix
from shoal.preview.words import (
    bill_words,
    lengths_words,
    memory_modes,
    memory_words,
    rows_words,
    sharing_words,
    spans_words,
    time_words,
)

BAR_HEIGHT, LEVEL_HEIGHT = 22, 24  # pixels
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; } p { margin: .4rem 0; }
section > svg { display: block; width: 100%; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.bar { fill: #4a90b8; } .prefix { fill: #4a90b8; stroke: Canvas; } .deep { fill: #6fae8a; stroke: Canvas; }
.icicle text { fill: #111; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .5rem .2rem 0; border-top: 1px solid #8886; }
td.number { text-align: right; white-space: nowrap; } code { font-size: .95em; }
"""


def page(found: Explanation) -> str:
    """The whole page, well-formed as XML too."""
    title = printable(f"Before the run: {found.input}")
    parts = [
        f"<h1>{title}</h1>",
        _paragraphs([f"{found.model}, context {count(found.context)} tokens, {memory_modes(found)}"]),
        _section("Time", _paragraphs(_times(found))),
        _section("Rows", _paragraphs([rows_words(found)]) + _bad_table(found)),
        _section("Prompts", _paragraphs([lengths_words(found.prompts)]) + histogram(found.prompts, "Prompt lengths")),
        _section(
            "Answers at most", _paragraphs([lengths_words(found.answers)]) + histogram(found.answers, "Answer limits")
        ),
        _section("Shared prefixes", _paragraphs([sharing_words(found)]) + _prefixes(found)),
    ]
    if found.memory is not None:
        parts.append(_section("Memory", _paragraphs([memory_words(found.memory)])))
    if found.advice:
        advice = "".join(f"<li><code>{escape(a.flag)}</code>: {escape(a.why)}</li>" for a in found.advice)
        parts.append(_section("Advice", f"<ul>{advice}</ul>"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def histogram(found: Lengths, name: str) -> str:
    """Bars from the left, one below the other, with their range before and their number behind them."""
    most = max((bar.count for bar in found.bars), default=1)
    rows = []
    for number, bar in enumerate(found.bars):
        top = number * BAR_HEIGHT
        wide = 55 * bar.count / max(most, 1)  # of a hundred: the rest is for words
        said = f"{count(bar.low)} – {count(bar.high)}" if bar.high > bar.low else count(bar.low)
        rows.append(
            f'<text x="27%" y="{top + 15}" text-anchor="end">{said}</text>'
            f'<rect class="bar" x="29%" y="{top + 3}" width="{wide:.2f}%" height="{BAR_HEIGHT - 6}"/>'
            f'<text x="{30 + wide:.2f}%" y="{top + 15}">{count(bar.count)}</text>'
        )
    height = BAR_HEIGHT * max(len(found.bars), 1)
    return f'<svg height="{height}" role="img" aria-label="{escape(name)}">{"".join(rows)}</svg>'


def icicle(prefixes: tuple[Prefix, ...], prompts: int) -> str:
    """The tree from above: as wide as the share of the prompts that begin with a prefix, one level below the other."""
    levels: list[int] = []
    for prefix in prefixes:
        levels.append(levels[prefix.above] + 1 if prefix.above >= 0 else 0)
    boxes = []
    for number, (prefix, level) in enumerate(zip(prefixes, levels, strict=True), 1):
        left, wide = 100 * prefix.left / prompts, 100 * prefix.uses / prompts
        said = printable(
            f"{number}: {prefix.text} (tokens {prefix.begin} to {prefix.end}, {count(prefix.uses)} prompts)"
        )
        boxes.append(  # a picture of its own, so that what is too long is cut off
            f'<svg x="{left:.3f}%" y="{level * LEVEL_HEIGHT}" width="{wide:.3f}%" height="{LEVEL_HEIGHT - 1}">'
            f'<title>{said}</title><rect class="{"deep" if level % 2 else "prefix"}" width="100%" height="100%"/>'
            f'<text x="3" y="16">{number}: {printable(prefix.text)}</text></svg>'
        )
    height = LEVEL_HEIGHT * (max(levels, default=0) + 1)
    return f'<svg class="icicle" height="{height}" role="img" aria-label="Tree of prefixes">{"".join(boxes)}</svg>'


def _times(found: Explanation) -> list[str]:
    more = list(spans_words(found.time)) if found.time is not None else []
    return [time_words(found), *more, *(f"{name}: {words}" for name, words in bill_words(found))]


def _bad_table(found: Explanation) -> str:
    if not found.bad:
        return ""
    rows = [(bad.code, count(bad.count), ", ".join(map(str, bad.lines)), bad.message) for bad in found.bad]
    return _table(("reason", "rows", "lines, as", "first of them"), rows)


def _prefixes(found: Explanation) -> str:
    if not found.prefixes:
        return ""
    prompts = max(prefix.left + prefix.uses for prefix in found.prefixes)
    rows = [
        (str(number), f"{count(p.begin)} – {count(p.end)}", count(p.uses), count(p.saved), p.text)
        for number, p in enumerate(found.prefixes, 1)
    ]
    table = _table(("", "tokens", "prompts", "saves", "text"), rows)
    return icicle(found.prefixes, max(prompts, found.rows.run)) + table


def _table(names: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    # The last column is text, even where a prefix of it is a number.
    body = "".join(
        "<tr>" + "".join(_cell(text) for text in row[:-1]) + f"<td>{printable(row[-1])}</td></tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    number = text.replace(",", "").isdigit()
    return f'<td class="number">{text}</td>' if number else f"<td>{printable(text)}</td>"


def printable(text: str) -> str:
    """Text as a page may hold it: a prompt can have control characters, which no page can."""
    return escape("".join(c if c >= " " and c not in "\x7f\ufffe\uffff" else "�" for c in text))


def _section(name: str, inside: str) -> str:
    return f"<section><h2>{escape(name)}</h2>{inside}</section>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{printable(text)}</p>" for text in texts)
