"""An explanation as one HTML page. It must not know where its numbers come from, nor how a page is made."""

from __future__ import annotations

from shoal.jobs.bill import bill_words
from shoal.jobs.units import count, duration, percent, size
from shoal.preview.facts import Explanation, Lengths
from shoal.preview.words import (
    lengths_words,
    memory_modes,
    memory_words,
    rows_words,
    sharing_words,
    spans_words,
    time_words,
)
from shoal.show.page import paragraphs, printable, section, table, tiles, two, whole
from shoal.show.pictures import histogram, trees


def page(found: Explanation) -> str:
    """The whole page, well-formed as XML too."""
    below = f"{found.model}, context {count(found.context)} tokens, {memory_modes(found)}"
    advice = "".join(f"<li><code>{printable(a.flag)}</code>: {printable(a.why)}</li>" for a in found.advice)
    return whole(
        f"Before the run: {found.input}",
        below,
        [
            tiles(_tiles(found)),
            section("Advice", f"<ul>{advice}</ul>" if advice else ""),
            section("Time", paragraphs([time_words(found)]), paragraphs(_times(found), soft=True)),
            section("Rows", paragraphs([rows_words(found)]), _bad(found)),
            section("Shared prefixes", paragraphs([sharing_words(found)]), trees(found.forest)),
            two(
                section("Prompts", paragraphs([lengths_words(found.prompts)]), _bars(found.prompts, "Prompt lengths")),
                section(
                    "Answers at most", paragraphs([lengths_words(found.answers)]), _bars(found.answers, "Answer limits")
                ),
            ),
            section("Answers of rows that were run", *_sampled(found.sampled)),
            section("Memory", paragraphs([memory_words(found.memory)]) if found.memory is not None else ""),
        ],
    )


def _tiles(found: Explanation) -> list[tuple[str, str, str]]:
    rows, saved = found.rows, found.prompt_tokens - found.bound
    numbers = [
        ("Rows", count(rows.total), f"{count(rows.run)} to run, {count(rows.bad)} bad, {count(rows.equal)} equal"),
        ("Prompt tokens to compute", count(found.bound), f"of {count(found.prompt_tokens)}"),
        ("Shared", percent(saved, found.prompt_tokens), f"{count(saved)} tokens"),
        ("Answer tokens at most", count(found.answers.total), f"{count(found.answers.middle)} in the middle row"),
    ]
    if found.time is not None:
        high = duration(found.time.high)
        low = duration(found.time.low).removesuffix(high[high.rindex(" ") :])
        numbers.append(("Time", f"{low} – {high}", "loading included"))
    if found.memory is not None and not found.memory.problem:
        need = f"of {size(found.memory.need_bytes)} that the job can fill"
        numbers.append(("Keys and values", size(found.memory.have_bytes), need))
    return numbers


def _times(found: Explanation) -> list[str]:
    more = list(spans_words(found.time)) if found.time is not None else []
    return [*more, *(f"{name}: {words}" for name, words in bill_words(found.bill))]


def _bad(found: Explanation) -> str:
    rows = [(bad.code, count(bad.count), ", ".join(map(str, bad.lines)), bad.message) for bad in found.bad]
    return table(("reason", "rows", "lines, as", "first of them"), rows) if rows else ""


def _sampled(found: Lengths | None) -> list[str]:
    return [] if found is None else [paragraphs([lengths_words(found)]), _bars(found, "Answer lengths")]


def _bars(found: Lengths, name: str) -> str:
    bars = [
        (f"{count(bar.low)} – {count(bar.high)}" if bar.high > bar.low else count(bar.low), bar.count)
        for bar in found.bars
    ]
    return histogram(bars, name)
