"""`shoal explain` and `shoal lint`, from options to what is shown. It knows the parts and does the work of none."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from shoal.core.errors import UsageError
from shoal.jobs.bill import Prices
from shoal.jobs.files import disk_errors
from shoal.jobs.options import JobOptions
from shoal.jobs.run import run_job
from shoal.preview.facts import Explanation, gather
from shoal.preview.fix import repair
from shoal.preview.lint import Lint, check, print_lint
from shoal.preview.lint import to_json as lint_json
from shoal.preview.look import look
from shoal.preview.options import ExplainOptions
from shoal.preview.page import page
from shoal.preview.passed import foresee, look_passed
from shoal.preview.passed_words import passed_lines
from shoal.preview.sample import sample
from shoal.preview.words import lines, print_lines, to_json

SOME_FAIL = 3  # as a run's exit code for failed lines


def explain(options: ExplainOptions, prices: Prices | None = None) -> Explanation:
    """All that can be said of a job before it runs in an engine of ours, but for the rows of a sample; `foresee` speaks
    of others."""
    if prices is not None:
        raise UsageError("--price-per-million is for servers: say --price-per-hour of this machine, or give --endpoint")
    with look(options.job) as looked:
        if options.sample is None:
            return gather(options, looked)
        return gather(options, looked, sample(looked, options.job, options.sample, run_job))


def run_explain(options: ExplainOptions, as_json: bool, console: Console, prices: Prices | None = None) -> None:
    """Explain a job on the console, and in a page where one is asked for."""
    found = foresee(options, prices) if options.job.servers else explain(options, prices)
    if options.html is not None and isinstance(found, Explanation):
        with disk_errors(options.html):
            options.html.write_text(page(found), encoding="utf-8")
    if as_json:
        console.print(to_json(found), markup=False, highlight=False, soft_wrap=True)
    else:
        print_lines(lines(found) if isinstance(found, Explanation) else passed_lines(found), console)


def lint(options: JobOptions, fixed: Path | None = None) -> Lint:
    """The verdict on every line of a file; the repaired file is written to `fixed` where that is given."""
    if options.servers:
        if fixed is not None:
            raise UsageError("--fix counts tokens, and a model at an --endpoint does that: leave one of them out")
        with look_passed(options) as passed:
            return check(passed)
    with look(options) as looked:
        found = check(looked)
        return found if fixed is None else repair(looked, found, fixed)


def run_lint(options: JobOptions, fixed: Path | None, as_json: bool, console: Console) -> int:
    """Check a file's lines; the exit code."""
    found = lint(options, fixed)
    if as_json:
        console.print(lint_json(found), markup=False, highlight=False, soft_wrap=True)
    else:
        print_lint(found, console)
    return 0 if found.clean else SOME_FAIL
