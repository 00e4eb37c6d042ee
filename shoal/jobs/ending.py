"""What a job comes to in the end: its exit code, and what is said of one that had ended before.

It must not know how rows are answered.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from shoal.jobs.options import JobOptions
from shoal.jobs.prepare import Prepared
from shoal.jobs.report import read_report
from shoal.jobs.report_words import print_report

INTERRUPTED, BUDGET_HIT, SOME_FAILED = 5, 4, 3


def ended_before(job: Prepared, console: Console) -> int:
    """The job had ended before: say what came of it."""
    report = read_report(job.options.output)
    if report.exit_code in (0, SOME_FAILED, BUDGET_HIT):  # as this run's budget judges it
        code = judge(job.options, report.rows.failed, report.rows.total)
        report = replace(report, exit_code=code)
    if not job.options.quiet:
        console.print("This job had ended before: here is its report. To run it anew, say --restart.")
        print_report(report, console)
    return report.status


def judge(options: JobOptions, failed: int, total: int) -> int:
    """The exit code of a job all of whose rows have ended."""
    return BUDGET_HIT if options.max_failures.exceeded(failed, total) else SOME_FAILED if failed else 0
