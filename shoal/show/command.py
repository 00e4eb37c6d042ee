"""`shoal report` and `shoal top`, from flags to what is shown. It knows the parts and does the work of none."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from shoal.jobs.bill import Prices, bill, bill_words, check_rates
from shoal.jobs.files import disk_errors
from shoal.jobs.report import Report, to_json
from shoal.jobs.report_words import print_report
from shoal.jobs.tally import look_report
from shoal.show.report_page import page
from shoal.show.story import noted, tell


def run_report(
    output: Path, html: Path | None, as_json: bool, price: float | None, watts: float | None, console: Console,
    prices: Prices | None = None,
) -> int:  # fmt: skip
    """Report on a job on the console, and in a page where one is asked for; the exit code."""
    check_rates(price, watts)
    if html is None:
        report = look_report(output)
    else:
        story = tell(output, price, watts)
        report = story.report
        with disk_errors(html):
            html.write_text(page(story), encoding="utf-8")
    found = bill(report.seconds.wall, report.seconds.wall, price, watts)
    if prices is not None:
        prompt, output_tokens = paid(report)
        found = replace(found, tokens=prices.cost((prompt, prompt), (output_tokens, output_tokens)))
    if as_json:
        more = {"bill": found, "timeline": noted(output)[1]}
        console.print(to_json(report, more), markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(report, console, list(bill_words(found)))
    return verdict(report)


def paid(report: Report) -> tuple[int, int]:
    """Prompt and output tokens of the answers that were computed: copies, and what a cache had, cost nothing."""
    return (
        report.tokens.prompt - report.reused.prompt_tokens,
        report.tokens.output - report.reused.output_tokens,
    )


def verdict(report: Report) -> int:
    """1 where counts do not add up or answers differ; how the job ended is another matter."""
    return 1 if report.problems() or report.verified.differ else 0
