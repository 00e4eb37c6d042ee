"""One HTML page in one file: no scripts, nothing from elsewhere; it is well-formed as XML too.

It knows headings, numbers, tables and words to put under them; it must not know what they are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from shoal.core import printable as core

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #5d6877; --line: #dfe3e8;
  --prompt: #3574b5; --decode: #e08a2c; --shared: #8fc1a9; --kv: #7d5fb2; --rows: #5d6877; --wait: #b9c1cb;
  --good: #2c8a5b; --bad: #c0392b; --warn: #b7791f; --box: #a9cbea; --deep: #bfe0cd; --rest: #e3e7ec; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161b; --card: #1b2128; --ink: #e6eaef; --soft: #9aa6b4;
  --line: #303943; --prompt: #5b9ad8; --decode: #eba75a; --shared: #4f9274; --kv: #a58bd4; --wait: #4b5763;
  --good: #5fbf8d; --bad: #ef7a6d; --warn: #e0b04c; --box: #2f5478; --deep: #2d5c47; --rest: #29313a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 0 auto; padding: 1.2rem 1rem 2.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: .2rem 0; } h2 { font-size: 1.02rem; margin: 0 0 .5rem; }
p { margin: .35rem 0; } p.row { margin: .55rem 0 .15rem; font-size: .85rem; } p.row b { font-weight: 600; }
p.soft, .soft { color: var(--soft); } ul { margin: .3rem 0; padding-left: 1.2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem;
  margin-top: .9rem; }
.state { display: inline-block; border-radius: 99px; padding: .05rem .7rem; font-size: .82rem; font-weight: 600;
  color: var(--card); background: var(--soft); vertical-align: .15rem; margin-left: .5rem; }
.state.good { background: var(--good); } .state.bad { background: var(--bad); } .state.warn { background: var(--warn); }
.loud { border: 2px solid var(--bad); color: var(--bad); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .7rem; margin-top: .9rem; }
.tiles.many { grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; display: block; line-height: 1.35; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 0 .9rem; }
section > svg, .chart > svg { display: block; width: 100%; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: currentColor; }
svg .soft { fill: var(--soft); color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .82rem; color: var(--soft); margin: .4rem 0 0; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .35rem;
  vertical-align: -.08rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; margin-top: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .7rem .28rem 0; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-top: 0; overflow-wrap: normal; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; } code { font-size: .93em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .9rem; margin: 0; font-size: .87rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 560px) { body { padding: .8rem .6rem 2rem; } section { padding: .75rem .7rem; }
  .tiles, .tiles.many { grid-template-columns: 1fr 1fr; gap: .5rem; margin-top: .7rem; } .tile b { font-size: 1.15rem; }
  table { font-size: .8rem; } th, td { padding-right: .45rem; } th { white-space: normal; } }
@media print { section, .tile { break-inside: avoid; } }
"""

ROW = 6  # tiles beside each other, at most
Tone = str  # "good", "warn", "bad", or "" for none


def whole(title: str, below: str, parts: Iterable[str], state: str = "", tone: Tone = "") -> str:
    """The page under its title, a line `below` it, and how things stand beside it."""
    badge = f' <span class="state {tone}">{printable(state)}</span>' if state else ""
    head = f'<header><h1>{printable(title)}{badge}</h1><p class="soft">{printable(below)}</p></header>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{printable(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join([head, *filter(None, parts)])
        + "\n</body></html>\n"
    )


def section(name: str, *inside: str) -> str:
    """A card with a heading; nothing where there is nothing inside."""
    return f"<section><h2>{printable(name)}</h2>{''.join(inside)}</section>" if any(inside) else ""


def two(*sections: str) -> str:
    """Sections beside each other where there is room."""
    return f'<div class="two">{"".join(sections)}</div>' if any(sections) else ""


def loud(texts: Sequence[str]) -> str:
    """What nobody may overlook."""
    return f'<section class="loud">{paragraphs(texts)}</section>' if texts else ""


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: what each is, itself, and a few words below it."""
    cells = [
        f'<div class="tile"><span>{printable(name)}</span><b>{printable(number)}</b>'
        f"<span>{printable(words)}</span></div>"
        for name, number, words in numbers
    ]
    return f'<div class="tiles{" many" if len(cells) > ROW else ""}">{"".join(cells)}</div>'


def paragraphs(texts: Iterable[str], soft: bool = False) -> str:
    """Each text by itself."""
    return "".join(f'<p class="soft">{printable(text)}</p>' if soft else f"<p>{printable(text)}</p>" for text in texts)


def caption(name: str, words: str) -> str:
    """A name with a few words behind it, above a picture."""
    return f'<p class="row"><b>{printable(name)}</b> <span class="soft">{printable(words)}</span></p>'


def pairs(named: Iterable[tuple[str, str]]) -> str:
    """Names and what there is to say of each."""
    return "<dl>" + "".join(f"<dt>{printable(name)}</dt><dd>{printable(said)}</dd>" for name, said in named) + "</dl>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers stand to the right. The last column is text, even where some of it is a number."""
    body, numbers = [], [True] * (len(names) - 1) + [False]
    kept = [tuple(row) for row in rows]
    for row in kept:
        numbers = [was and _number(text) for was, text in zip(numbers, row, strict=True)]
    sides = [' class="number"' if number else "" for number in numbers]
    head = "".join(f"<th{side}>{printable(name)}</th>" for side, name in zip(sides, names, strict=True))
    for row in kept:
        body.append("<tr>" + "".join(f"<td{s}>{_cell(t)}</td>" for s, t in zip(sides, row, strict=True)) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def legend(colours: Iterable[tuple[str, str]]) -> str:
    """What colours mean: names of the style's variables, and words."""
    words = (f'<span><i style="background: var(--{name})"></i>{printable(said)}</span>' for name, said in colours)
    return f'<div class="legend">{"".join(words)}</div>'


def printable(text: str) -> str:
    """Text as a page may hold it: a prompt can have characters that no page can."""
    return escape(core.printable(text))


def _cell(text: str) -> str:
    """Long names of codes and fields break at their underscores."""
    return printable(text).replace("_", "_<wbr/>")


def _number(text: str) -> bool:
    return not text or text.replace(",", "").replace(".", "").replace(" – ", "").removesuffix(" %").isdigit()
