"""One picture of a job for a terminal: how far it is, how fast, what its steps are made of, what is slow, what failed.

It must not know where its numbers come from, nor whether another picture follows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from shoal.jobs.display import Progress, left_words, rows_words
from shoal.jobs.pulse import Pulse
from shoal.jobs.report import Report
from shoal.jobs.report_words import errors, fault_word
from shoal.jobs.terminal import said
from shoal.jobs.timeline import Timeline
from shoal.jobs.units import count, duration, percent, size

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE, NARROW = 40, 24  # characters of a curve, and where there are less than WIDE in a line
WIDE = 110
STALE = 10.0  # seconds without a word after which a running job is said to be silent
FAILURES = 5  # kinds that are shown
LAST = 10  # columns, seconds, whose mean is the pace of a running job

Named = tuple[str, Text | Group]


@dataclass(frozen=True, slots=True)
class Seen:
    """A job at one moment, as its folder tells it."""

    output: Path
    running: bool  # a run holds the folder
    now: float  # Unix time
    report: Report | None = None  # None: its input is still being read
    pulse: Pulse | None = None
    timeline: Timeline | None = None

    @property
    def over(self) -> bool:
        """Whether nothing will change any more by itself."""
        return not self.running


def frame(seen: Seen, width: int = WIDE) -> Group:
    """The picture, for lines of so many characters."""
    wide = CURVE if width >= WIDE else NARROW
    how, style = standing(seen)
    title = Text.assemble(said(f"{seen.output}", "bold"), "   ", said(how, style))
    parts: list[Text | Rule | Table | Padding] = [title, Rule(style="dim")]
    report, pulse = seen.report, seen.pulse
    if report is None:
        return Group(*parts, said("reading and planning the input; numbers come when that is done"))
    for problem in report.problems():
        parts.append(said(f"THESE COUNTS DO NOT ADD UP, and that is a bug in Shoal: {problem}", style="bold red"))
    parts += _progress(seen, report, width)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, words in [*_pace(seen, wide), *_slow(seen), *_failures(report)]:
        table.add_row(said(name), words)
    parts.append(Padding(table, (1, 0, 0, 0)))
    if not seen.running and not report.finished:
        parts.append(said("It is not running: run the same command again and it continues.", style="yellow"))
    elif seen.running and pulse is not None and seen.now - pulse.at > STALE:
        parts.append(said(f"Its last word is {duration(seen.now - pulse.at)} old.", style="yellow"))
    return Group(*parts)


def standing(seen: Seen) -> tuple[str, str]:
    """How the job stands, and the style to say it in."""
    report, pulse = seen.report, seen.pulse
    if report is not None and report.finished and not seen.running:
        failed = report.rows.ended - report.rows.ok
        return ("finished", "bold green") if not failed else ("finished, with failed lines", "bold yellow")
    if not seen.running:
        when = f", last seen {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(pulse.at))}" if pulse else ""
        return f"not running: stopped or killed{when}", "bold red"
    if report is None or pulse is None:
        return "starting", "bold yellow"
    words = {
        "loading": "loading the model", "running": "running", "restarting": "the engine died: starting another",
        "checking": "computing a share of the answers again", "ended": "ending",
    }[pulse.state]  # fmt: skip
    restarts = f", {count(pulse.restarts)} restarts of the engine" if pulse.restarts else ""
    return words + restarts, "bold yellow" if restarts or pulse.state == "restarting" else "bold green"


def _progress(seen: Seen, report: Report, width: int) -> list[Text | Table]:
    """The bar: of the pulse while it is the younger of the two."""
    rows, pulse = report.rows, seen.pulse
    known = Progress(rows.total, rows.ended, rows.ended - rows.ok, rows.ended)
    if pulse is not None and pulse.progress.rows_done >= rows.ended and pulse.progress.rows_total == rows.total:
        known = pulse.progress
    words = [percent(known.rows_done, known.rows_total), rows_words(known)]
    if seen.running and pulse is not None:
        words.append(left_words(pulse.rates))
    words.append(duration(report.seconds.wall) if report.finished else f"{duration(report.seconds.wall)} so far")
    bar = ProgressBar(total=max(known.rows_total, 1), completed=known.rows_done, width=min(width, 2 * CURVE))
    line = Table.grid()
    line.add_row(bar)
    return [line, said("   ".join(words))]


def _pace(seen: Seen, wide: int) -> list[Named]:
    """What steps were made of over the last minutes; of a job that is over, over all of it."""
    pulse = seen.pulse
    line = pulse.recent if seen.running and pulse is not None else seen.timeline
    found: list[Named] = []
    if line is not None and line.prompt:
        of = f"the last {duration(line.width * len(line.prompt))}" if seen.running else "all its time"
        prompt, output = ([tokens / line.width for tokens in values] for values in (line.prompt, line.output))
        for name, values, style in (("prompts", prompt, "blue"), ("answers", output, "yellow")):
            last = values[-1 - LAST : -1] or values  # the very last column is not full yet
            mean = sum(last) / len(last) if seen.running else sum(values) / len(values)
            found.append((name, _curve(wide, values, f"{count(mean)} tokens/s, {count(max(values))} at most", style)))
        found.append(("memory", _curve(wide, line.kv, _memory(seen, line), "magenta", 1.0)))
        requests = f"{count(max(line.running))} requests at once at most"
        if seen.running and pulse is not None:
            requests = f"{count(pulse.running)} requests, {count(pulse.waiting)} wait in the engine"
        found.append(("running", _curve(wide, line.running, requests, "cyan")))
        found.append(("", said(f"(curves are over {of})", style="dim")))
    if pulse is not None and (saved := pulse.progress.tokens_saved):
        share = percent(saved, pulse.progress.tokens_in)
        found.append(("shared", said(f"{count(saved)} prompt tokens were not computed ({share})")))
    return found


def _memory(seen: Seen, line: Timeline) -> str:
    progress = seen.pulse.progress if seen.pulse is not None else None
    full = f"{100 * max(line.kv):.0f} % at most"
    if not seen.running or progress is None or not progress.kv_total:
        return f"{full}, of the memory for keys and values"
    return f"{size(progress.kv_used)} of {size(progress.kv_total)} for keys and values, {full}"


def _slow(seen: Seen) -> list[Named]:
    """Rows that run, and those that have ended: the longest of both."""
    found: list[Named] = []
    if seen.running and seen.pulse is not None and seen.pulse.longest:
        lines = [said(str(row)) for row in seen.pulse.longest]
        found.append(("longest now", Group(*lines)))
    if seen.report is not None and seen.report.slowest:
        words = [
            said(f"line {count(row.line)}: {duration(row.prefill + row.decode)}, {row.why}")
            for row in seen.report.slowest[:3]
        ]
        found.append(("slowest", Group(*words)))
    return found


def _failures(report: Report) -> list[Named]:
    kinds = errors(report)
    lines = [
        said(f"{count(group.count)} {code}{fault_word(group)}, as line {group.line}: {group.message}")
        for code, group in kinds[:FAILURES]
    ]
    if len(kinds) > FAILURES:
        lines.append(said(f"and {count(len(kinds) - FAILURES)} more kinds: shoal report has them"))
    return [("failed", Group(*lines))] if lines else []


def _curve(wide: int, values: Sequence[float], words: str, style: str, top: float | None = None) -> Text:
    return Text.assemble(said(f"{spark(values, wide, top):>{wide}}", style), "  ", said(words))


def spark(values: Sequence[float], width: int, top: float | None = None) -> str:
    """Values as a row of at most `width` blocks, the latest to the right; of several in one place, the mean."""
    if not values:
        return ""
    number = min(width, len(values))
    edges = [place * len(values) // number for place in range(number + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)]
    most = max(max(means) if top is None else top, 1e-9)
    return "".join(
        " " if value <= 0 else BLOCKS[min(int(value / most * len(BLOCKS)), len(BLOCKS) - 1)] for value in means
    )
