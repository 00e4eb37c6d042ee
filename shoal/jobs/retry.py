"""Running failed rows of a job again: which ones, and what the job forgets of them.

It knows journals and faults; it must not know how rows are run: the job goes on with them as with any others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from shoal.core.errors import fault_of
from shoal.jobs.files import DiskFiles, Files
from shoal.jobs.journal import Journal
from shoal.jobs.look import View
from shoal.jobs.note import options_of, read_note
from shoal.jobs.options import JobOptions
from shoal.jobs.prepare import errors_path
from shoal.jobs.state import open_state
from shoal.jobs.swap import NOTE, RUNNING
from shoal.jobs.tables import form_of
from shoal.jobs.tally import code_of
from shoal.jobs.units import count


def failed_lines(journal: Journal, every: bool, late: bool) -> Iterator[int]:
    """Lines that failed by no fault of their own, or all that failed; `late`: also those whose time was up."""
    for line, status, stats in journal.stats():
        if status != "ok":
            code = code_of(status, json.loads(stats))
            if every or fault_of(code) != "yours" or (late and code == "row_timeout"):
                yield line


def reopen(options: JobOptions, files: Files, every: bool, late: bool = False) -> int | None:
    """Have the job forget its failed rows, so that its next run answers them. Returns how many these are; None when an
    earlier call has done so, and they have not all ended."""
    one_file = options.one_file and form_of(options.output) == "jsonl"
    with open_state(options.output, None if one_file else errors_path(options.output), files) as state:
        journal = Journal(state.path)
        try:
            if journal.meta(NOTE):
                return None
            lines = list(failed_lines(journal, every, late))
            if lines:
                state.reopen()  # first: a job that is finished does not look into its journal
                journal.reopen(lines, NOTE, RUNNING)
            return len(lines)
        finally:
            journal.close()


def retry_job(
    output: Path, every: bool, change: dict[str, object], timeout: float | None, run: Callable[[JobOptions], int],
    console: Console,
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
        again = reopen(options, DiskFiles(), every, late=timeout is not None)
        if not options.quiet:
            more = "" if every or again else ": failed lines that are left are yours; --all runs these too"
            words = "failed rows of an earlier retry" if again is None else f"{count(again)} failed rows"
            console.print(f"retry   {words} run again{more}", soft_wrap=True)
        return run(options)
