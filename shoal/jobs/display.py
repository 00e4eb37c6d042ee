"""What a running job shows on the terminal. It is told numbers and a clock, and must not know where they come from.

With a terminal: three lines that change in place. Without: a line every few seconds. Quiet: warnings alone.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shoal.core.clock import Clock
from shoal.jobs.terminal import said
from shoal.jobs.units import count, duration, percent, size
from shoal.jobs.watches import Straggler

WINDOW = 15.0  # seconds over which rates are taken: long enough for a step of long prompts, short enough to follow
LIVE_EVERY = 0.25  # seconds between pictures on a terminal
PLAIN_EVERY = 5.0  # seconds between lines without one


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What is known before any model work."""

    input: str
    model: str
    rows: int
    bad: int  # lines that cannot be run; each ends in an error line
    prompt_tokens: int
    prompt_bound: int  # the fewest prompt tokens that can be computed, with every shared prefix computed once
    kv_bytes: int
    kv_tokens: int
    seconds: float  # spent reading, checking, tokenizing and ordering
    resumed: int = 0  # rows answered by an earlier run
    device: str = "cpu"
    copies: int = 0  # rows that ask for what an earlier row asks for
    kv: str = ""  # how keys and values are kept
    served: bool = False  # by servers, who count tokens, and have keys and values

    def lines(self) -> list[str]:
        """The plan in words, one fact a line."""
        saved = self.prompt_tokens - self.prompt_bound
        words = [
            f"model   {self.model} on {self.device}",
            f"input   {self.input}: {count(self.rows)} rows" + (f", {count(self.bad)} bad lines" if self.bad else ""),
            f"plan    {percent(saved, self.prompt_tokens)} of the prompts' text is shared, and sent in one piece "
            f"({duration(self.seconds)})"
            if self.served
            else f"plan    {count(self.prompt_tokens)} prompt tokens, {count(self.prompt_bound)} to compute: "
            f"{percent(saved, self.prompt_tokens)} shared ({duration(self.seconds)})",
        ]
        memory = (
            f"memory  {size(self.kv_bytes)} for {count(self.kv_tokens)} tokens of keys and values"
            + (f" in {self.kv}" if self.kv else "")
            if self.kv_bytes or not self.kv_tokens
            else "memory  no keys and values: whole texts, sorted by length"
        )
        words += [] if self.served else [memory]
        if self.copies:
            words.append(f"equal   {count(self.copies)} rows ask for what an earlier one asks for: they get its answer")
        if self.resumed:
            words.append(f"resume  {count(self.resumed)} rows were answered by an earlier run")
        return words


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at one moment. All counts are totals since this run began, rows apart."""

    rows_total: int
    rows_done: int  # ended one way or another, earlier runs included
    rows_failed: int = 0
    rows_written: int = 0
    waiting_for: int | None = None  # the line that holds back the writer
    tokens_in: int = 0  # prompt tokens of the rows served so far, computed or shared
    tokens_out: int = 0
    tokens_saved: int = 0  # of tokens_in, those that were shared instead of computed
    work_done: int = 0  # tokens computed: prompts and answers
    work_left: int | None = None  # tokens still to compute: planned prompts and predicted answers; None: unknown
    kv_used: int = 0  # bytes
    kv_total: int = 0  # bytes
    looped: int = 0  # rows that were cut off while they repeated themselves
    straggler: Straggler | None = None  # the row that runs much longer than others have
    seconds_left: float | None = None  # by a forecast; None: by the tokens a second


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second over the last few seconds, and what they say about the end."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0
    seconds_left: float = math.inf


class Window:
    """Rates over a sliding window. The clock is the caller's."""

    def __init__(self, seconds: float = WINDOW) -> None:
        self.seconds = seconds
        self._seen: deque[tuple[float, Progress]] = deque()

    def add(self, now: float, progress: Progress) -> Rates:
        """The rates with `progress` seen at `now`; all zero, and the end unknown, until time has passed."""
        self._seen.append((now, progress))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self.seconds:
            self._seen.popleft()
        begin, first = self._seen[0]
        passed = now - begin
        if passed <= 0:
            return Rates(seconds_left=0.0 if progress.work_left == 0 else math.inf)
        work = (progress.work_done - first.work_done) / passed
        left = math.inf
        if progress.seconds_left is not None:
            left = progress.seconds_left
        elif progress.work_left is not None:
            left = progress.work_left / work if work > 0 else 0.0 if progress.work_left == 0 else math.inf
        return Rates(
            (progress.tokens_in - first.tokens_in) / passed, (progress.tokens_out - first.tokens_out) / passed, left
        )


def rows_words(progress: Progress) -> str:
    """Rows done, failed and written."""
    words = f"{count(progress.rows_done)}/{count(progress.rows_total)} rows"
    if progress.rows_failed:
        words += f", {count(progress.rows_failed)} failed"
    if progress.rows_written < progress.rows_done:
        words += f", {count(progress.rows_written)} written"
        if progress.waiting_for is not None:
            words += f" (waiting for line {count(progress.waiting_for)})"
    if progress.looped:
        words += f", {count(progress.looped)} repeat themselves"
    return words


def token_words(progress: Progress, rates: Rates) -> str:
    """Tokens a second in and out, and what sharing saved."""
    saved = f"{count(progress.tokens_saved)} prompt tokens saved ({percent(progress.tokens_saved, progress.tokens_in)})"
    return f"{count(rates.tokens_in)} tokens/s in, {count(rates.tokens_out)} out, {saved}"


def memory_words(progress: Progress) -> str:
    """How full the memory for keys and values is; nothing where there is none."""
    return f"memory {size(progress.kv_used)} of {size(progress.kv_total)}" if progress.kv_total else ""


def left_words(rates: Rates) -> str:
    """How long it will take, as far as anybody knows."""
    return f"{duration(rates.seconds_left)} left" if math.isfinite(rates.seconds_left) else "time left unknown"


def plain_line(progress: Progress, rates: Rates) -> str:
    """Everything in one line, for logs."""
    return "; ".join(
        [rows_words(progress), token_words(progress, rates)]
        + [words for words in (memory_words(progress), left_words(rates)) if words]
        + ([str(progress.straggler)] if progress.straggler else []),
    )


def picture(progress: Progress, rates: Rates) -> Group:
    """Everything in three lines, for a terminal."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=max(progress.rows_total, 1), completed=progress.rows_done, width=30),
                said(rows_words(progress)))  # fmt: skip
    last = ", ".join(words for words in (memory_words(progress), left_words(rates)) if words)
    last += f"; {progress.straggler}" if progress.straggler else ""
    return Group(bar, said(token_words(progress, rates)), said(last))


class Display:
    """The terminal of one job. Use it as a context; `show` may be called as often as one likes.

    A console that is no terminal gets plain lines.
    """

    def __init__(self, console: Console, clock: Clock, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._clock = clock
        self._window = Window()
        self._every = LIVE_EVERY if console.is_terminal else PLAIN_EVERY
        self._due = -math.inf
        self._reading_due = clock.now() + self._every  # most inputs are read before that
        self._live: Live | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def plan(self, facts: PlanFacts) -> None:
        """Say what is about to happen."""
        for line in facts.lines():
            self.note(line)

    def note(self, words: str) -> None:
        """Say something once; nothing when quiet."""
        if not self.quiet:
            self.console.print(said(words, lines=True), soft_wrap=True)

    def warn(self, words: str) -> None:
        """Say something that matters even to those who asked for quiet."""
        self.console.print(said(f"warning: {words}", "yellow", lines=True), soft_wrap=True)

    def reading(self, rows: int, done: int, whole: int) -> None:
        """Say how far the input is read, in bytes, when it is time to."""
        now = self._clock.now()
        if self.quiet or now < self._reading_due:
            return
        self._reading_due = now + self._every
        self._picture(said(f"reading and planning: {count(rows)} rows, {percent(done, whole)} of the input"))

    def show(self, progress: Progress, last: bool = False) -> None:
        """Take note of the job's progress and show it when it is time to, in any case the `last` time."""
        now = self._clock.now()
        if not last and now < self._due:
            return
        self._due = now + self._every
        rates = self._window.add(now, progress)
        if self.quiet:
            return
        self._picture(picture(progress, rates) if self.console.is_terminal else said(plain_line(progress, rates)))

    def _picture(self, what: Group | Text) -> None:
        """In place of the last one on a terminal; else below it."""
        if not self.console.is_terminal:
            self.console.print(what, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._live.update(what, refresh=True)
