"""What is foreseen of a job over servers, in words for a terminal. It must not know where its numbers come from."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.jobs.bill import Range
from shoal.jobs.units import count, percent
from shoal.preview.passed import Foreseen
from shoal.preview.words import PREFIXES, bars, lengths_words, rows_of


def passed_lines(found: Foreseen) -> Iterator[tuple[str, str]]:
    """Pairs of a heading, empty where the one above goes on, and what there is to say."""
    yield "servers", ", ".join(found.servers)
    yield "rows", rows_of(found.rows, found.input)
    for bad in found.bad:
        yield "", f"{bad.code}: {count(bad.count)}, as line {', '.join(map(str, bad.lines))}: {bad.message}"
    names = [f"{name or 'none, which the server chooses'} ({count(rows)})" for name, rows in found.calls.models.items()]
    yield "models", ", ".join(names)
    yield "prompts", lengths_words(found.texts, "bytes of text")
    yield from (("", bar) for bar in bars(found.texts))
    yield "order", order_words(found)
    for prefix in sorted(found.forest.prefixes, key=lambda prefix: -prefix.saved)[:PREFIXES]:
        yield "", f"{count(prefix.uses)} prompts begin with: {prefix.text}"
    yield "answers", answers_words(found)
    yield "tokens", f"{span(found.prompt_tokens)} of prompts, at 6 to 2 bytes of text for each"
    if found.cost is not None:
        yield "cost", f"{found.cost[0]:.4g} to {found.cost[1]:.4g}, in the currency of --price-per-million"
    yield "unknown", "; ".join(found.unknown)


def order_words(found: Foreseen) -> str:
    """What the order brings to a server's cache of prefixes."""
    return (
        f"{count(found.shared)} bytes ({percent(found.shared, found.texts.total)}) of the prompts begin as the one "
        "before does, in the order in which they are sent: a server's cache of prefixes has them"
    )


def answers_words(found: Foreseen) -> str:
    """How many, and how long they may be."""
    calls = found.calls
    words = f"{count(calls.answers)} are asked for"
    if found.output_tokens is not None:
        words += f", of {count(found.output_tokens[1])} tokens at most"
    if calls.open:
        words += f"; {count(calls.open)} rows have no max_tokens: --body '{{\"max_tokens\": N}}' gives them one"
    return words


def span(found: Range) -> str:
    """A range of counts."""
    return f"{count(round(found[0]))} to {count(round(found[1]))}"
