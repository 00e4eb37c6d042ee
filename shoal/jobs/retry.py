"""Running failed rows of a job again: which ones, and what the job forgets of them.

It knows journals and faults; it must not know how rows are run: the job goes on with them as with any others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from shoal.core.errors import fault_of
from shoal.jobs.journal import Journal
from shoal.jobs.look import View
from shoal.jobs.note import options_of, read_note
from shoal.jobs.options import JobOptions
from shoal.jobs.results import Results
from shoal.jobs.state import StateFolder
from shoal.jobs.swap import NOTE
from shoal.jobs.tally import code_of
from shoal.jobs.terminal import said
from shoal.jobs.units import count


@dataclass(frozen=True, slots=True)
class Again:
    """Which rows of a job are to run again: those that failed by no fault of their own, or all that failed."""

    every: bool = False
    late: bool = False  # also those whose time was up
    say: Callable[[str], None] = lambda words: None  # tells the user what becomes of it

    def idle(self, folder: Path) -> bool:
        """Whether no row of the finished job in `folder` is to run again; it is said then."""
        journal = Journal(folder)
        try:
            found = bool(self._lines(journal))
        finally:
            journal.close()
        if not found:
            self.say(self._words(0, False))
        return not found

    def open(self, opened: Callable[[], Results], state: StateFolder) -> Results:
        """The results of a job, its failed rows forgotten so that they are answered again.

        `opened` opens them, ends what an earlier retry left half done, and compares both files with the journal: only
        then nothing that a user has put there can be written over.
        """
        results = opened()
        lines: list[int] | None = None
        try:
            lines = self._lines(results.journal)
            self.say(self._words(len(lines), bool(results.journal.meta(NOTE))))
            if lines:
                state.reopen()  # first: a job that is finished does not look into its journal
                results.forget(lines)
        finally:
            if lines != []:
                results.close()
        return opened() if lines else results

    def _lines(self, journal: Journal) -> list[int]:
        found = []
        for line, status, stats in journal.stats():
            if status != "ok":
                code = code_of(status, json.loads(stats))
                if self.every or fault_of(code) != "yours" or (self.late and code == "row_timeout"):
                    found.append(line)
        return found

    def _words(self, number: int, goes_on: bool) -> str:
        if goes_on:
            more = f", and {count(number)} failed rows more" if number else ""
            return f"the rows of an earlier retry go on{more}"
        left = "" if self.every or number else ": failed lines that are left are yours; --all runs these too"
        return f"{count(number)} failed rows run again{left}"


def retry_job(
    output: Path, every: bool, change: dict[str, object], timeout: float | None,
    run: Callable[[JobOptions, Again], int], console: Console,
) -> int:  # fmt: skip
    """Run the failed rows of the job of `output` again, with the options it had but for `change`; the exit code.

    With a `timeout` [s] for rows that have none of their own, those whose time was up are among them.
    """
    with View(output) as view:
        note = read_note(view)
    with options_of(note, output) as options:
        options = replace(options, **change)  # type: ignore[arg-type]  # names and kinds are the command's
        if timeout is not None:
            options = replace(options, body=options.body | {"timeout": timeout})

        def say(words: str) -> None:
            if not options.quiet:
                console.print(said(f"retry   {words}"), soft_wrap=True)

        return run(options, Again(every, timeout is not None, say))
