"""The main job as a function call. It must not do anything that the command does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.core.errors import UsageError
from shoal.jobs.options import STDIN, JobOptions, place_of
from shoal.jobs.report import Report, read_report
from shoal.jobs.run import run_job


def run(input: str | Path, output: str | Path, *, endpoint: str | None = None, **options: Any) -> Report:
    """Answer every row of the file `input` into `output`, or go on with it, and return the report.

    `options` are the fields of JobOptions, which are the flags of `shoal run`: model, prompt, chat, body, order, …;
    `endpoint` has the addresses of servers that answer in place of an engine.
    Failed rows are no exception: `report.exit_code` and `report.errors` tell. ShoalErrors say what cannot be done.
    """
    if Path(input) == STDIN:
        raise UsageError("shoal.run reads a file; standard input is the command's: shoal run -i -")
    place = place_of(options.pop("device", "cpu"), endpoint)
    run_job(JobOptions(input=Path(input), output=Path(output), device=place, **{"quiet": True, **options}))
    return read_report(Path(output))
