"""`shoal sim`, from options to what is shown. It knows the parts and does the work of none."""

from __future__ import annotations

from rich.console import Console

from shoal.jobs.files import disk_errors
from shoal.what_if.options import SimOptions
from shoal.what_if.page import page
from shoal.what_if.study import study
from shoal.what_if.words import print_study, to_json


def run_sim(options: SimOptions, as_json: bool, console: Console) -> None:
    """Simulate, and show what came of it on the console, and in a page where one is asked for."""
    found = study(options)
    if options.html is not None:
        with disk_errors(options.html):
            options.html.write_text(page(found), encoding="utf-8")
    if as_json:
        console.print(to_json(found), markup=False, highlight=False, soft_wrap=True)
    else:
        print_study(found, console)
