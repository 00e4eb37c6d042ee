"""`shoal top`: looks at a job's folder again and again, and shows what it sees in place, until it is over or `q`.

It reads and never writes, so it may run anywhere that sees the folder; it must not know how a picture is made.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live

from shoal.core.errors import StateError
from shoal.jobs.journal import NAME as JOURNAL
from shoal.jobs.look import is_running
from shoal.jobs.report import Report
from shoal.jobs.state import folder_of
from shoal.jobs.tally import look_report
from shoal.show.command import verdict
from shoal.show.frame import Seen, frame
from shoal.show.story import noted

EVERY = 1.0  # seconds between looks: as often as a job says how it stands
PATIENCE = 20  # rows are counted again after so many times what counting them took


class Looker:
    """Looks at one job. Rows are counted less often where there are so many that it takes long."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._report: Report | None = None
        self._due = 0.0

    def look(self) -> Seen:
        """The job at this moment. A StateError where there is none."""
        running = is_running(self.output)  # first: what ends meanwhile is seen the next time
        if running and not (folder_of(self.output) / JOURNAL).exists():
            return Seen(self.output, running, time.time())
        try:
            self._count(running)
            return Seen(self.output, running, time.time(), self._report, *noted(self.output))
        except StateError:
            if not running or self._report is not None:
                raise
            return Seen(self.output, running, time.time())  # the journal is being made

    def _count(self, running: bool) -> None:
        began = time.monotonic()
        if self._report is None or not running or began >= self._due:
            self._report = look_report(self.output)
            self._due = began + PATIENCE * (time.monotonic() - began)


def run_top(output: Path, once: bool, console: Console) -> int:
    """Show the job until it is over or somebody has seen enough; the exit code."""
    looker = Looker(output)
    seen = looker.look()
    if not once and console.is_terminal and not seen.over:
        seen = _watch(looker, seen, console)
    console.print(frame(seen, console.width))
    return 0 if seen.report is None else verdict(seen.report)


def _watch(looker: Looker, seen: Seen, console: Console) -> Seen:
    """Pictures in place; the last thing seen."""
    try:
        with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            live.update(frame(seen, console.width), refresh=True)  # interrupted as it opens it would not close
            while not seen.over and "q" not in pressed(EVERY).lower():
                seen = looker.look()
                live.update(frame(seen, console.width), refresh=True)
    except KeyboardInterrupt:
        pass  # the other way to leave
    return seen


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for keys and returns them; it only waits where there is no keyboard."""
    if not sys.stdin.isatty():
        yield _wait
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _keys
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _keys(seconds: float) -> str:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 64).decode(errors="replace") if ready else ""
