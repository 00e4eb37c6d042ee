"""A report in words: for a terminal, and line by line for whoever shows it elsewhere.

It must not know how anything was counted, nor where a report is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from shoal.jobs.report import Again, Engine, Failures, Report, Reused, Rows, Sent, Tokens, compared
from shoal.jobs.terminal import said
from shoal.jobs.units import count, duration, percent, size

SHOWN = 3  # slow rows named to a person


def rows_line(rows: Rows) -> str:
    """How the rows ended, leaving out what did not happen."""
    words = [f"{count(rows.total)} rows", f"{count(rows.ok)} ok"]
    words += [
        f"{count(number)} {name}"
        for name, number in (("failed", rows.failed), ("expired", rows.expired), ("cancelled", rows.cancelled))
        if number
    ]
    if left := rows.total - rows.ended:
        words.append(f"{count(left)} not ended")
    return f"{words[0]}: {', '.join(words[1:])}"


def prompt_line(tokens: Tokens, interrupted: bool = False, reused: int = 0) -> str:
    """Prompt tokens computed, against all of them and against the bound; `reused` ones saved no prefix."""
    total = tokens.prompt - reused
    saved, could = total - tokens.prompt_computed, total - tokens.prompt_bound
    words = f"{count(tokens.prompt)} in, {count(tokens.prompt_computed)} computed"
    if saved > could:  # nobody knows yet what sharing saves
        words += f" of at least {count(tokens.prompt_bound)}: the others are of rows that failed or have not ended"
    else:
        words += f": shared prefixes saved {count(saved)} ({percent(saved, tokens.prompt)})"
        words += f" of the {count(could)} that a memory without limit would"
    if reused:
        words += f"; {count(reused)} of rows that were not computed"
    if tokens.prompt_recomputed:
        why = "after an interruption or for want of memory" if interrupted else "for want of memory"
        words += f"; {count(tokens.prompt_recomputed)} computed again {why}"
    if tokens.prompt_last:
        words += f"; {count(tokens.prompt_last)} last tokens of fully shared prompts computed again"
    return words


def sent_line(sent: Sent) -> str:
    """Requests, and those of them that were in vain."""
    vain = [
        f"{count(number)} {what}"
        for number, what in ((sent.refused, "found no room"), (sent.broken, "were broken off or failed in passing"))
        if number
    ]
    return f"{count(sent.requests)} requests" + (f", of which {' and '.join(vain)}: made again" if vain else "")


def served_line(report: Report) -> str:
    """Prompt tokens by the servers' own account."""
    tokens, cached = report.tokens, report.sent.prompt_cached
    words = f"{count(tokens.prompt)} in, by the servers' account"
    words += f": their caches had {count(cached)} ({percent(cached, tokens.prompt)})" if cached else ""
    reused = report.reused.prompt_tokens
    return words + (f"; {count(reused)} of rows that were not computed" if reused else "")


def reused_line(reused: Reused) -> str:
    """Rows that were not computed, and what that saved."""
    rows = [f"{count(reused.duplicates)} rows that ask for what an earlier one asks for"] if reused.duplicates else []
    if reused.cached:
        of_cache = (
            f" ({count(reused.cached_prompt_tokens)} prompt and {count(reused.cached_output_tokens)} output tokens)"
        )
        rows += [f"{count(reused.cached)} rows of the cache" + (of_cache if reused.duplicates else "")]
    return f"{' and '.join(rows)}: {count(reused.prompt_tokens)} prompt and {count(reused.output_tokens)} output tokens"


def again_line(again: Again) -> str:
    """Tokens computed more than once, each with its reason."""
    reasons = (
        (again.preempted, "prompt tokens of rows put off for want of memory"),
        (again.apart, "prompt tokens on more than one device"),
        (again.other, "prompt tokens for other reasons"),
        (again.restarted, "prompt tokens after an interruption, a dead engine or a retry"),
        (again.last, "last tokens of fully shared prompts"),
        (again.output, "tokens of answers of rows put off for want of memory"),
    )
    return ", ".join(f"{count(number)} {why}" for number, why in reasons if number)


def engine_line(engine: Engine) -> str:
    """What one of several engines has done."""
    return (
        f"{engine.device}: {count(engine.rows)} rows, {count(engine.prompt_computed)} prompt and "
        f"{count(engine.output)} output tokens computed, busy for {duration(engine.seconds)}"
    )


def facts(report: Report) -> list[tuple[str, str]]:
    """The report in words, as pairs of a name and what there is to say."""
    tokens, seconds = report.tokens, report.seconds
    decode = max(seconds.wall - seconds.load - seconds.plan, 0.0)
    rate = f", {count((tokens.prompt + tokens.output) / decode)} tokens/s in and out" if decode > 0 else ""
    interrupted = report.runs > 1 or report.engine_restarts > 0
    pairs = [
        ("rows", rows_line(report.rows)),
        (
            "prompt tokens",
            served_line(report) if report.endpoints else prompt_line(tokens, interrupted, report.reused.prompt_tokens),
        ),
        ("output tokens", count(tokens.output)),
        (
            "time",
            f"{duration(seconds.wall)} ({duration(seconds.load)} loading, {duration(seconds.plan)} planning), "
            f"{duration(seconds.cpu)} of processor time{rate}",
        ),
        ("sent", sent_line(report.sent)) if report.endpoints else ("steps", count(report.steps)),
        ("peak memory", size(report.peak_memory_bytes)),
    ]
    if report.reused != Reused():
        pairs.insert(1, ("not computed", reused_line(report.reused)))
    if report.verified.rows:
        pairs.append(
            (
                "verified",
                f"{count(report.verified.rows)} rows computed again: "
                + (
                    f"{count(len(report.verified.differ))} differ" if report.verified.differ else "the same to the byte"
                ),
            )
        )
    if words := again_line(report.again):
        pairs.append(("computed again", words))
    pairs += [(f"engine {number}", engine_line(one)) for number, one in enumerate(report.engines)]
    if report.looped:
        pairs.append(("loops", f"{count(report.looped)} answers repeat themselves up to their limit"))
    pairs += [
        (
            f"slow: line {row.line}",
            f"{duration(row.prefill + row.decode)}, after {duration(row.queue)} in the queue: {row.why}",
        )
        for row in report.slowest[:SHOWN]
    ]
    if report.model:
        arithmetic = f", {report.weights} weights" if report.weights else ""
        arithmetic += f", {report.kv} keys and values" if report.kv else ""
        pairs.insert(0, ("model", report.model + arithmetic))
    if interrupted:
        pairs.append(("runs", f"{report.runs}, with {report.engine_restarts} restarts of the engine"))
    pairs += [
        (f"error {code}", f"{count(g.count)}{fault_word(g)}, as line {g.line}: {g.message}")
        for code, g in errors(report)
    ]
    pairs += [
        ("written", f"{path}: {count(lines)} {'line' if lines == 1 else 'lines'}")
        for path, lines in report.files.items()
    ]
    return pairs


def fault_word(group: Failures) -> str:
    """Whose these failures are."""
    return f" ({group.fault})" if group.fault else ""


def errors(report: Report) -> list[tuple[str, Failures]]:
    """Groups of failed lines, the largest first."""
    return sorted(report.errors.items(), key=lambda item: (-item[1].count, item[0]))


def print_report(report: Report, console: Console, more: Iterable[tuple[str, str]] = ()) -> None:
    """Show the report to a person, and `more` below it. What does not add up comes first and loud."""
    for problem in report.problems():
        console.print(said(f"THESE COUNTS DO NOT ADD UP, and that is a bug in Shoal: {problem}", style="bold red"))
    if lines := report.verified.differ:
        shown = ", ".join(map(str, lines[:10])) + (", …" if len(lines) > 10 else "")
        console.print(said(f"ANSWERS ARE NOT WHAT COMPUTING THEM AGAIN GIVES: lines {shown}", style="bold red"))
    if report.running:
        console.print(said("The job is running; what it has spent is noted every few seconds.", style="yellow"))
    elif not report.finished:
        console.print(said("The job has not finished: run the same command again and it continues.", style="yellow"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, words in (*facts(report), *more):
        table.add_row(said(name), said(words, lines=True))
    console.print(table)
    if report.predicted is not None:
        console.print(predicted_table(report))


def predicted_table(report: Report) -> Table:
    """Predicted against actual."""
    assert report.predicted is not None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "predicted", "actual" if report.finished else "so far"):
        table.add_column(name, overflow="fold")
    for one in compared(report):
        table.add_row(said(one.name), *map(said, one.words()))
    if report.predicted.why:
        table.add_row(said(report.predicted.lacking), said(report.predicted.why), said(""))
    return table
