"""`shoal explain` as a function call, whose result shows itself in a notebook.

It knows the parts that explain and show; it must not know how anything is found out.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from shoal.core.errors import UsageError
from shoal.jobs.bill import parse_prices
from shoal.jobs.options import STDIN, JobOptions, place_of
from shoal.preview.command import explain as explain_job
from shoal.preview.facts import Explanation
from shoal.preview.options import ExplainOptions
from shoal.preview.page import page
from shoal.preview.passed import Foreseen, foresee
from shoal.preview.passed_words import passed_lines
from shoal.preview.words import lines, to_json

FRAME = 640  # pixels: a page in a notebook scrolls beyond that


class Explained:
    """What a job will do: `facts` has every number; printed it is the command's text, in a notebook its page."""

    def __init__(self, facts: Explanation | Foreseen) -> None:
        self.facts = facts

    def __repr__(self) -> str:
        pairs = lines(self.facts) if isinstance(self.facts, Explanation) else passed_lines(self.facts)
        return "\n".join(f"{name:<10}{words}" for name, words in pairs)

    def _repr_html_(self) -> str | None:
        """The page in a frame of its own: its style is for the whole page, and must not be for the notebook's. Of a job
        over servers there is none, and its words are shown."""
        if not isinstance(self.facts, Explanation):
            return None
        style = f"width: 100%; height: {FRAME}px; border: 0"
        return f'<iframe srcdoc="{escape(self.html)}" style="{style}"></iframe>'

    @property
    def html(self) -> str:
        """One page with everything it needs."""
        if not isinstance(self.facts, Explanation):
            raise UsageError("of a job over servers there is no page: print it, or take its json")
        return page(self.facts)

    @property
    def json(self) -> str:
        """As `shoal explain --json`."""
        return to_json(self.facts)


def explain(
    input: str | Path,
    *,
    answer_tokens: int | None = None,
    price_per_hour: float | None = None,
    watts: float | None = None,
    calibrate: bool = False,
    endpoint: str | None = None,
    price_per_million: str | None = None,
    sample: int | None = None,
    **options: Any,
) -> Explained:
    """Say what `shoal.run` with these options would do with the file `input`. Needs no weights, but for a `sample`.

    `options` are the fields of JobOptions: model, prompt, chat, body, memory, …; the others are the command's flags.
    Of a job over servers, at an `endpoint`, less is known, and `facts` has less.
    """
    if Path(input) == STDIN:
        raise UsageError("shoal.explain reads a file; standard input is the command's: shoal explain -i -")
    if endpoint is not None:
        options["device"] = place_of(options.get("device", "cpu"), endpoint)
    job = JobOptions(input=Path(input), output=Path(os.devnull), **options)  # nothing is answered
    asked = ExplainOptions(job, None, answer_tokens, price_per_hour, watts, calibrate, sample)
    prices = parse_prices(price_per_million)
    return Explained(foresee(asked, prices) if job.servers else explain_job(asked, prices))
