"""The main job as a function call: over files as the command does it, or over rows that a program makes.

It must not do anything that the command, or a stream, does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

from shoal.core.errors import UsageError
from shoal.jobs.options import OURS, STDIN, JobOptions, place_of
from shoal.jobs.report import Report, read_report
from shoal.jobs.run import run_job
from shoal.jobs.stream import WINDOW, Counts, Result, Stream, stream
from shoal.preview.foresee import Foreseer


@overload
def run(
    input: str | Path, output: str | Path, *, endpoint: str | None = None, engine: str = OURS, **options: Any
) -> Report: ...


@overload
def run(
    input: Iterable[object],
    *,
    window: int = WINDOW,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    **options: Any,
) -> Stream: ...


def run(
    input: str | Path | Iterable[object], output: str | Path | None = None, *, endpoint: str | None = None,
    engine: str = OURS, **options: Any,
) -> Report | Stream:  # fmt: skip
    """Answer every row of the file `input` into `output`, or go on with it, and return the report.

    `options` are the fields of JobOptions, which are the flags of `shoal run`: model, prompt, chat, body, order, …;
    `endpoint` has the addresses of servers that answer in place of an engine, `engine="vllm"` starts one.
    Failed rows are no exception: `report.exit_code` and `report.errors` tell. ShoalErrors say what cannot be done.

    Without files: `input` is anything that yields rows, dicts as the lines of a file or texts, and what comes back
    yields a Result for each as it finishes. At most `window` rows are under way. Closing it ends the work.
    `on_result` is called with each Result, `on_progress` about twice a second with Counts.
    """
    if not isinstance(input, (str, os.PathLike)):
        if output is not None:
            raise UsageError("rows that are in no file have no output file: take the results, and leave output out")
        if endpoint is not None or engine != OURS:
            raise UsageError("rows that servers are to answer must be in a file: write them to one, and name an output")
        return stream(input, {name: value for name, value in options.items() if name not in _HOW}, **_of(options))
    if output is None:
        raise UsageError(f"the answers to {input} need a file: say shoal.run({str(input)!r}, 'answers.jsonl')")
    if Path(input) == STDIN:
        raise UsageError("shoal.run reads a file; standard input is the command's: shoal run -i -")
    for name in _HOW:
        if name in options:
            raise UsageError(f"{name} is for rows that are in no file: leave it out, and read the answers in {output}")
    place = place_of(options.pop("device", "cpu"), endpoint, engine)
    job = JobOptions(input=Path(input), output=Path(output), device=place, **{"quiet": True, **options})
    run_job(job, seer=Foreseer())
    return read_report(Path(output))


_HOW = ("window", "on_result", "on_progress")


def _of(options: dict[str, Any]) -> dict[str, Any]:
    """What says how results are taken, not how they are made."""
    return {name: options[name] for name in _HOW if name in options}
