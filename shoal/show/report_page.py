"""A job's story as one HTML page. It must not know where its numbers come from, nor how a page is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shoal.core.errors import fault_of
from shoal.jobs.bill import bill_words
from shoal.jobs.display import left_words
from shoal.jobs.report import Report, Slow, compared
from shoal.jobs.report_words import again_line, errors, prompt_line, reused_line, rows_line
from shoal.jobs.report_words import facts as facts_of
from shoal.jobs.timeline import Timeline
from shoal.jobs.units import count, duration, percent
from shoal.show.page import caption, legend, loud, pairs, paragraphs, section, table, tiles, two, whole
from shoal.show.pictures import Part, curves, spans, stacked, trees
from shoal.show.story import Story

HELP = {"yours": "correct the line", "ours": "shoal retry", "transient": "shoal retry"}
COLUMNS = 240  # of a picture, at most: more are thinner than a dot


def page(story: Story) -> str:
    """The whole page, well-formed as XML too."""
    report = story.report
    state, tone = standing(report)
    arithmetic = f", {report.weights} weights" if report.weights else ""
    arithmetic += f", {report.kv} keys and values" if report.kv else ""
    at = f"; as it stood on {_date(story.pulse.at)}" if story.pulse is not None else ""
    problems = [f"These counts do not add up, and that is a bug in Shoal: {problem}" for problem in report.problems()]
    if differ := report.verified.differ:
        lines = ", ".join(map(str, differ[:10])) + (", …" if len(differ) > 10 else "")
        problems.append(f"Answers are not what computing them again gives: lines {lines}")
    return whole(
        f"{report.input or 'A job'} → {story.output.name}",
        f"{report.model or 'a model'}{arithmetic}{at}",
        [
            loud(problems),
            tiles(_tiles(story)),
            section("Predicted and actual", _predicted(report)),
            section("Rows", _rows(report), _failures(report)),
            section("What became of the prompt tokens", _tokens(report)),
            section("While it ran", _timeline(story.timeline)),
            section("Shared prefixes", _prefixes(story)),
            section("Slowest rows", _slowest(report.slowest)),
            section("All of it", pairs(_rest(story))),
        ],
        state,
        tone,
    )


def _predicted(report: Report) -> str:
    """What was said when the job was planned, beside what has come of it."""
    if report.predicted is None:
        return ""
    names = ("", "predicted", "actual" if report.finished else "so far")
    said = report.predicted
    why = [f"{said.lacking.capitalize()}: {said.why}."] if said.why else []
    return table(names, [(one.name, *one.words()) for one in compared(report)]) + paragraphs(why)


def standing(report: Report) -> tuple[str, str]:
    """How a job stands, in a word, and the tone of it."""
    if report.problems():
        return "does not add up", "bad"
    if report.verified.differ:
        return "answers differ", "bad"
    if report.running:
        return "running", "warn"
    if not report.finished:
        return "not finished", "bad"
    return ("finished, with failed lines", "warn") if report.rows.ok < report.rows.total else ("finished", "good")


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _tiles(story: Story) -> list[tuple[str, str, str]]:
    report, rows, tokens, seconds = story.report, story.report.rows, story.report.tokens, story.report.seconds
    lost = rows.ended - rows.ok
    saved = max(tokens.prompt - tokens.prompt_computed, 0) if report.finished else tokens.prompt - tokens.prompt_bound
    by = "" if report.finished else ", by the plan"
    numbers = [
        ("Rows answered", count(rows.ok), f"of {count(rows.total)}, {count(lost)} failed"),
        ("Time", duration(seconds.wall), f"{duration(seconds.cpu)} of processor time"),
        ("Prompt tokens", count(tokens.prompt), f"{count(tokens.prompt_computed)} computed"),
        ("Not computed", percent(saved, tokens.prompt), f"{count(saved)} prompt tokens{by}"),
        ("Output tokens", count(tokens.output), f"in {count(report.steps)} steps"),
    ]
    busy = max(seconds.wall - seconds.load - seconds.plan, 0.0)
    if busy > 0:
        rate = (tokens.prompt_computed + tokens.output - report.reused.output_tokens) / busy
        numbers.append(("Computed a second", count(rate), "tokens of prompts and answers"))
    if report.running and story.pulse is not None:
        numbers.insert(2, ("Still to do", left_words(story.pulse.rates), f"{count(rows.total - rows.ended)} rows"))
    if story.bill.cost is not None:
        numbers.append(("Cost", f"{story.bill.cost[0]:.4g}", "in the money of --price-per-hour"))
    if story.bill.kilowatt_hours is not None:
        energy = story.bill.kilowatt_hours[0]
        said = f"{energy:.3g} kWh" if energy >= 1 else f"{1000 * energy:.3g} Wh"
        numbers.append(("Energy", said, "with the --watts of this machine"))
    return numbers


def _rows(report: Report) -> str:
    rows, free = report.rows, report.reused.duplicates + report.reused.cached
    parts: list[Part] = [
        ("good", rows.ok - free, f"{count(rows.ok - free)} computed"),
        ("shared", report.reused.duplicates, f"{count(report.reused.duplicates)} equal to an earlier row"),
        ("kv", report.reused.cached, f"{count(report.reused.cached)} from the cache"),
        ("bad", rows.failed, f"{count(rows.failed)} failed"),
        ("warn", rows.expired + rows.cancelled, f"{count(rows.expired + rows.cancelled)} never ran"),
        ("wait", max(rows.total - rows.ended, 0), f"{count(rows.total - rows.ended)} not ended"),
    ]
    return paragraphs([rows_line(rows)]) + (stacked(parts, "Rows by how they ended") if rows.total else "")


def _failures(report: Report) -> str:
    rows = [
        (code, group.fault or fault_of(code), count(group.count), count(group.line), group.message)
        for code, group in errors(report)
    ]
    if not rows:
        return ""
    words = ", ".join(f"{fault}: {HELP[fault]}" for fault in dict.fromkeys(row[1] for row in rows) if fault in HELP)
    named = table(("failed because of", "whose fault", "rows", "as line", "which says"), rows)
    return named + paragraphs([f"What helps: {words}."], soft=True)


def _tokens(report: Report) -> str:
    tokens, reused = report.tokens, report.reused
    first = tokens.prompt_computed - tokens.prompt_recomputed
    left = 0 if report.finished else max(tokens.prompt_bound - first, 0)
    copied = reused.prompt_tokens - reused.cached_prompt_tokens
    prefix = max(tokens.prompt - reused.prompt_tokens - first - left, 0)
    will = "" if report.finished else " when it ends"
    parts: list[Part] = [
        ("prompt", first, f"{count(first)} computed once"),
        ("decode", tokens.prompt_recomputed, f"{count(tokens.prompt_recomputed)} computed again"),
        ("wait", left, f"{count(left)} still to compute"),
        ("shared", prefix, f"{count(prefix)} saved by shared prefixes{will}"),
        ("deep", copied, f"{count(copied)} of rows equal to an earlier one"),
        ("kv", reused.cached_prompt_tokens, f"{count(reused.cached_prompt_tokens)} of rows from the cache"),
    ]
    words = []
    if report.finished:
        words.append(prompt_line(tokens, report.runs > 1 or report.engine_restarts > 0, reused.prompt_tokens) + ".")
    if reused.duplicates or reused.cached:
        words.append(f"Not computed at all: {reused_line(reused)}.")
    if said := again_line(report.again):
        words.append(f"Computed twice: {said}.")
    return stacked(parts, "Prompt tokens by what became of them") + paragraphs(words) if tokens.prompt else ""


def _timeline(found: Timeline | None) -> str:
    """What every moment's steps were made of, and how full the memory was."""
    if found is None or not found.prompt:
        return paragraphs(
            ["Nothing has been computed yet, or by a version of Shoal that kept no time line."], soft=True
        )
    found.shrink(COLUMNS)
    prompt, output = ([tokens / found.width for tokens in values] for values in (found.prompt, found.output))
    most = max(one + other for one, other in zip(prompt, output, strict=True))
    lines = [begin / found.end for begin in found.begins]
    words = (("prompt", "prompt tokens a second"), ("decode", "answer tokens a second"))
    again = (("bad", "a run began anew"),) if lines else ()
    rows, full = max(found.running), max(found.kv)
    ends = (duration(found.since), duration(found.end))
    memory = two(
        _chart("Memory for keys and values", f"{100 * full:.0f} % used at most", "kv", found.kv, 1.0, ("100 %", *ends))
        if full
        else "",
        _chart("Requests at once", f"{count(rows)} at most", "rows", found.running, rows, (count(rows), *ends)),
    )
    picture = curves(
        [("prompt", prompt), ("decode", output)], most, (f"{count(most)} a second", *ends), "Tokens", 130, lines
    )
    return legend((*words, *again)) + picture + memory


def _chart(name: str, words: str, colour: str, values: Sequence[float], top: float, marks: tuple[str, str, str]) -> str:
    """A small picture of one thing."""
    return f'<div class="chart">{caption(name, words)}{curves([(colour, values)], top, marks, name, 70)}</div>'


def _slowest(rows: list[Slow]) -> str:
    if not rows:
        return ""
    bars = [
        (
            f"line {count(row.line)}: {duration(row.prefill + row.decode)}",
            [
                ("prompt", row.prefill, f"{duration(row.prefill)} until its first token"),
                ("decode", row.decode, f"{duration(row.decode)} from there to its end"),
            ],
            f"after {duration(row.queue)} in the queue; {row.why}",
        )
        for row in rows
    ]
    words = (("prompt", "until its first token"), ("decode", "from there to its end"))
    return spans(bars, "Slowest rows") + legend(words)


def _prefixes(story: Story) -> str:
    if story.forest is None:
        return paragraphs([story.no_forest], soft=True)
    if not story.forest.prefixes:
        return paragraphs(["No two prompts begin alike."], soft=True)
    saved = f"The plan's {count(story.forest.prompts)} different prompts need not compute {count(story.forest.saved)} "
    words = paragraphs([saved + "tokens, because others begin alike. As wide as the share of prompts that begin so:"])
    why = paragraphs([story.no_forest], soft=True) if story.no_forest else ""
    return words + why + trees(story.forest)


def _rest(story: Story) -> list[tuple[str, str]]:
    """What the report says in words, but for what has its own place on the page."""
    elsewhere = ("rows", "slow: ", "error ", "model", "not computed", "computed again", "prompt tokens")
    named = [pair for pair in facts_of(story.report) if not pair[0].startswith(elsewhere)]
    named += bill_words(story.bill)
    versions = ", ".join(f"{name} {number}" for name, number in story.report.versions.items())
    hashes = (("manifest", story.report.manifest), ("plan", story.report.plan), ("versions", versions))
    return named + [(name, value) for name, value in hashes if value]
