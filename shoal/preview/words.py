"""An explanation in words and bars for a terminal, and as JSON. It must not know where its numbers come from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import msgspec
from rich.console import Console

from shoal.jobs.bill import bill_words
from shoal.jobs.terminal import said
from shoal.jobs.units import count, duration, percent, size
from shoal.preview.facts import Explanation, Forecast, Lengths, Memory, Rows, Span
from shoal.preview.machine import ERROR

BAR = 30  # characters of the longest bar
PREFIXES = 8  # shown on a terminal


def to_json(found: msgspec.Struct) -> str:
    """Everything, for programs."""
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def print_lines(pairs: Iterable[tuple[str, str]], console: Console) -> None:
    """Headings and what there is to say, for a person."""
    for name, words in pairs:
        console.print(said(f"{name:<10}", style="bold"), said(words, lines=True), sep="", soft_wrap=True)


def lines(found: Explanation) -> Iterator[tuple[str, str]]:
    """Pairs of a heading, empty where the one above goes on, and what there is to say."""
    yield "model", f"{found.model}, context {count(found.context)} tokens, {memory_modes(found)}"
    yield "rows", rows_words(found)
    for bad in found.bad:
        yield "", f"{bad.code}: {count(bad.count)}, as line {', '.join(map(str, bad.lines))}: {bad.message}"
    yield "prompts", lengths_words(found.prompts)
    yield from (("", bar) for bar in bars(found.prompts))
    yield "answers", f"at most {lengths_words(found.answers)}"
    yield from (("", bar) for bar in bars(found.answers))
    if found.sampled is not None:
        yield "", f"of rows that were run: {lengths_words(found.sampled)}"
    yield "sharing", sharing_words(found)
    shown = sorted(found.forest.prefixes, key=lambda prefix: -prefix.saved)[:PREFIXES]
    for prefix in shown:
        yield (
            "", f"tokens {count(prefix.begin)} to {count(prefix.end)} of {count(prefix.uses)} prompts, "
            f"saves {count(prefix.saved)}: {prefix.text}"
        )  # fmt: skip
    if more := len(found.forest.prefixes) - len(shown) + found.forest.others:
        saved = found.forest.saved - sum(prefix.saved for prefix in shown)
        yield "", f"{count(more)} smaller ones save {count(saved)} together"
    if found.memory is not None:
        yield "memory", memory_words(found.memory)
    yield "time", time_words(found)
    if found.time is not None:
        yield from (("", words) for words in spans_words(found.time))
    yield from bill_words(found.bill)
    for advice in found.advice:
        yield "advice", f"{advice.flag}: {advice.why}"


def memory_modes(found: Explanation) -> str:
    """How weights, keys and values are kept."""
    if found.memory is None:
        return "an encoder, which takes every text by itself"
    return f"{found.memory.weights} weights, {found.memory.kv} keys and values"


def rows_words(found: Explanation) -> str:
    """Lines by what becomes of them."""
    return rows_of(found.rows, found.input)


def rows_of(rows: Rows, source: str) -> str:
    """The same, of rows that came from there."""
    words = [f"{count(rows.total)} in {source}: {count(rows.run)} to run"]
    if rows.equal:
        words.append(f"{count(rows.equal)} that ask for what an earlier one asks for")
    words.append(f"{count(rows.bad)} bad")
    overflow = f" ({count(rows.overflow)} of them do not fit the context)" if rows.overflow else ""
    return ", ".join(words) + overflow


def lengths_words(found: Lengths, unit: str = "tokens") -> str:
    """A distribution in one line."""
    spread = f"{count(found.least)} to {count(found.most)} {unit}, half below {count(found.middle)}"
    return f"{spread}, {count(found.total)} in all"


def bars(found: Lengths) -> Iterator[str]:
    """A histogram, a line for each bar."""
    most = max((bar.count for bar in found.bars), default=1)
    names = [f"{count(bar.low)} – {count(bar.high)}" if bar.high > bar.low else count(bar.low) for bar in found.bars]
    wide = max(map(len, names), default=0)
    for name, bar in zip(names, found.bars, strict=True):
        yield f"{name:>{wide}}  {'█' * -(-BAR * bar.count // max(most, 1))} {count(bar.count)}"


def sharing_words(found: Explanation) -> str:
    """Prompt tokens without sharing and with it."""
    saved = found.prompt_tokens - found.bound
    return (
        f"{count(found.prompt_tokens)} prompt tokens, {count(found.bound)} to compute: "
        f"{count(saved)} ({percent(saved, found.prompt_tokens)}) are shared"
    )


def memory_words(memory: Memory) -> str:
    """Keys and values against what there is for them."""
    if memory.problem:
        return memory.problem
    enough = "all that the job can fill" if memory.have_tokens >= memory.need_tokens else "less than the job can fill"
    return (
        f"{size(memory.have_bytes)} for {count(memory.have_tokens)} tokens of keys and values, {enough}: "
        f"{size(memory.need_bytes)} for {count(memory.need_tokens)}; weights {size(memory.weight_bytes)}"
    )


def time_words(found: Explanation) -> str:
    """The range, and what it rests on."""
    time = found.time
    if time is None:
        return f"not predicted: {found.no_time}"
    why = {
        "compute": "limited by compute", "bandwidth": "limited by reading weights (bandwidth)",
        "attention": "limited by looking back over long contexts", "memory": "limited by memory for keys and values",
    }[time.limit]  # fmt: skip
    known = "" if time.likely else " (answers may end at once, or run to their limits: give --sample)"
    return f"{duration(time.low)} to {duration(time.high)}{known}, {why}"


def spans_words(time: Forecast) -> Iterator[str]:
    """What each way that the answers may turn out takes."""
    if time.likely is not None:
        yield span_words("the steps", time.likely)
    if time.likely is None or time.likely.answer_tokens != time.most.answer_tokens:
        yield span_words("if answers end at once", time.least)
        yield span_words("if every answer runs to its limit", time.most)
    yield (
        f"before them, at once: loading about {duration(time.load)}, reading and planning {duration(time.plan)}; "
        f"this machine was measured {measured_words(time)}"
    )


def measured_words(time_: Forecast) -> str:
    """When the machine was measured, and whether that can be relied on."""
    unsteady = f", while its speed varied by {100 * time_.unsteady:.0f} %" if time_.unsteady > ERROR else ""
    return time.strftime("on %Y-%m-%d at %H:%M", time.localtime(time_.measured_at)) + unsteady


def span_words(name: str, span: Span) -> str:
    """One way and where its time goes."""
    waited = f"; rows wait for memory during {100 * span.waited:.0f} %" if span.waited > 0.005 else ""
    job = f", {100 * span.job:.0f} % reading rows and writing answers" if span.job > 0.005 else ""
    return (
        f"{name}: {duration(span.seconds)} for {count(span.answer_tokens)} answer tokens in {count(span.steps)} steps: "
        f"{100 * span.weights:.0f} % reading weights, {100 * span.compute:.0f} % computing, "
        f"{100 * span.attention:.0f} % attention{job}{waited} (by {span.by})"
    )
