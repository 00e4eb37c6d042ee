"""`shoal explain` from its options to what is shown. It knows the parts and does the work of none."""

from __future__ import annotations

from rich.console import Console

from shoal.explain.facts import Explanation, gather
from shoal.explain.look import look
from shoal.explain.options import ExplainOptions
from shoal.explain.page import page
from shoal.explain.words import print_explanation, to_json
from shoal.jobs.files import disk_errors


def explain(options: ExplainOptions) -> Explanation:
    """All that can be said of a job before it runs."""
    with look(options.job) as looked:
        return gather(options, looked)


def run_explain(options: ExplainOptions, as_json: bool, console: Console) -> None:
    """Explain a job on the console, and in a page where one is asked for."""
    found = explain(options)
    if options.html is not None:
        with disk_errors(options.html):
            options.html.write_text(page(found), encoding="utf-8")
    if as_json:
        console.print(to_json(found), markup=False, highlight=False, soft_wrap=True)
    else:
        print_explanation(found, console)
