"""Pictures as SVG that grow with the page. It must not know what they are pictures of, prefixes apart.

Widths are shares of the page, heights and letters are not: so they can be read on a telephone too. What must stretch
in both directions, a curve, is a picture of its own inside, in a hundred by a hundred units and without letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.jobs.units import count
from shoal.show.page import caption, legend, printable, table
from shoal.show.prefixes import Forest, Prefix

BAR_HEIGHT, LEVEL_HEIGHT = 22, 24  # pixels
LISTED = 8  # prefixes that have a number and a line of words
SHARE = 0.001  # of all that is saved, which a prefix that is listed saves
LEAST = 0.25  # of a hundred: boxes that are narrower cannot be seen

Part = tuple[str, float, str]  # a colour of the style, a number, and what it counts


def histogram(bars: Sequence[tuple[str, float]], name: str) -> str:
    """Bars from the left, one below the other, with what they are before and their number behind them."""
    most = max((number for _, number in bars), default=1)
    rows = []
    for place, (said, number) in enumerate(bars):
        top = place * BAR_HEIGHT
        wide = 58 * number / max(most, 1)  # of a hundred: the rest is for words
        rows.append(
            f'<text class="soft" x="27%" y="{top + 15}" text-anchor="end">{printable(said)}</text>'
            f'<rect x="29%" y="{top + 3}" width="{wide:.2f}%" height="{BAR_HEIGHT - 6}" rx="2"'
            f' style="fill: var(--prompt)"/><text x="{30 + wide:.2f}%" y="{top + 15}">{count(number)}</text>'
        )
    return _svg("".join(rows), BAR_HEIGHT * max(len(bars), 1), name)


def stacked(parts: Sequence[Part], name: str) -> str:
    """One bar of parts, with what they are below it."""
    whole = sum(number for _, number, _ in parts)
    left, boxes = 0.0, []
    for colour, number, said in parts:
        wide = 100 * number / max(whole, 1e-9)
        boxes.append(
            f'<rect x="{left:.3f}%" y="0" width="{wide:.3f}%" height="26" style="fill: var(--{colour})">'
            f"<title>{printable(said)}</title></rect>"
        )
        left += wide
    return _svg("".join(boxes), 26, name) + legend((colour, said) for colour, number, said in parts if number)


def spans(rows: Sequence[tuple[str, Sequence[Part], str]], name: str) -> str:
    """Bars of parts that share one scale, each under its own words."""
    most = max((sum(number for _, number, _ in parts) for _, parts, _ in rows), default=1)
    drawn = []
    for said, parts, words in rows:
        left, boxes = 0.0, []
        for colour, number, what in parts:
            wide = 100 * number / max(most, 1e-9)
            boxes.append(
                f'<rect x="{left:.3f}%" width="{wide:.3f}%" height="12" style="fill: var(--{colour})">'
                f"<title>{printable(what)}</title></rect>"
            )
            left += wide
        drawn.append(caption(said, words) + _svg("".join(boxes), 12, f"{name}: {said}"))
    return "".join(drawn)


def curves(
    layers: Sequence[tuple[str, Sequence[float]]], top: float, marks: tuple[str, str, str], name: str,
    high: int = 120, lines: Sequence[float] = (),
) -> str:  # fmt: skip
    """Layers of a colour over each other, on a scale that ends at `top`; `marks` are words for its top, and below it
    for its beginning and its end. `lines` stand at shares of the width."""
    number = max((len(values) for _, values in layers), default=0)
    below = [0.0] * number
    drawn = []
    for colour, values in layers:
        above = [low + value for low, value in zip(below, values, strict=True)]
        drawn.append(f'<path style="fill: var(--{colour})" d="{_area(below, above, max(top, 1e-9))}"/>')
        below = above
    drawn += [
        f'<path d="M{100 * line:.2f} 0V100" vector-effect="non-scaling-stroke"'
        ' style="stroke: var(--bad); stroke-dasharray: 3 3; fill: none"/>'
        for line in lines
    ]
    inside = (
        f'<svg x="0" y="16" width="100%" height="{high}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f"{''.join(drawn)}</svg>"
        f'<line x1="0" x2="100%" y1="{16 + high}" y2="{16 + high}" style="stroke: var(--line)"/>'
        f'<line x1="0" x2="100%" y1="16" y2="16" style="stroke: var(--line); stroke-dasharray: 2 4"/>'
        f'<text class="soft" x="0" y="11">{printable(marks[0])}</text>'
        f'<text class="soft" x="0" y="{high + 31}">{printable(marks[1])}</text>'
        f'<text class="soft" x="100%" y="{high + 31}" text-anchor="end">{printable(marks[2])}</text>'
    )
    return _svg(inside, high + 36, name)


def _area(below: Sequence[float], above: Sequence[float], top: float) -> str:
    """A path in steps: along `above` to the right, and along `below` back."""
    wide = 100 / max(len(above), 1)

    def y(value: float) -> str:
        return f"{100 - 100 * min(value / top, 1.0):.1f}"

    there = "".join(f"V{y(value)}H{wide * (place + 1):.2f}" for place, value in enumerate(above))
    back = "".join(f"V{y(below[place])}H{wide * place:.2f}" for place in reversed(range(len(below))))
    return f"M0 {y(below[0])}{there}{back}Z" if below else ""


def trees(forest: Forest) -> str:
    """The tree of prefixes as a picture, the largest in words, and the others in one line."""
    if not forest.prefixes:
        return ""
    ranked = sorted(range(len(forest.prefixes)), key=lambda place: -forest.prefixes[place].saved)
    worth = [place for place in ranked[:LISTED] if SHARE * forest.saved <= forest.prefixes[place].saved]
    listed = {place: number for number, place in enumerate(sorted(worth), 1)}
    rows = [
        (str(number), _range(forest.prefixes[place]), count(forest.prefixes[place].uses),
         count(forest.prefixes[place].saved), forest.prefixes[place].text or "(the model's tokenizer is not here)")
        for place, number in listed.items()
    ]  # fmt: skip
    if more := len(forest.prefixes) - len(listed) + forest.others:
        saved = forest.saved - sum(forest.prefixes[place].saved for place in listed)
        rows.append(("", "", "", count(saved), f"{count(more)} smaller ones together"))
    return icicle(forest, listed) + table(("", "tokens", "prompts", "saves", "text"), rows)


def icicle(forest: Forest, listed: dict[int, int]) -> str:
    """The tree from above: as wide as the share of the prompts that begin with a prefix, one level below the other."""
    levels: list[int] = []
    for prefix in forest.prefixes:
        levels.append(levels[prefix.above] + 1 if prefix.above >= 0 else 0)
    boxes = []
    for place, (prefix, level) in enumerate(zip(forest.prefixes, levels, strict=True)):
        left, wide = 100 * prefix.left / forest.prompts, 100 * prefix.uses / forest.prompts
        if wide < LEAST and place not in listed:
            continue
        colour = ("deep" if level % 2 else "box") if place in listed else "rest"
        said = f"{prefix.text} (tokens {_range(prefix)}, {count(prefix.uses)} prompts, saves {count(prefix.saved)})"
        words = f'<text x="4" y="16">{listed[place]}: {printable(prefix.text)}</text>' if place in listed else ""
        boxes.append(  # a picture of its own, so that what is too long is cut off
            f'<svg x="{left:.3f}%" y="{level * LEVEL_HEIGHT}" width="{wide:.3f}%" height="{LEVEL_HEIGHT - 1}">'
            f'<title>{printable(said)}</title><rect width="100%" height="100%"'
            f' style="fill: var(--{colour}); stroke: var(--card)"/>{words}</svg>'
        )
    return _svg("".join(boxes), LEVEL_HEIGHT * (max(levels) + 1), "Tree of prefixes", "icicle")


def _range(prefix: Prefix) -> str:
    return f"{count(prefix.begin)} – {count(prefix.end)}"


def _svg(inside: str | Iterable[str], height: int, name: str, kind: str = "picture") -> str:
    return f'<svg class="{kind}" height="{height}" role="img" aria-label="{printable(name)}">{"".join(inside)}</svg>'
