"""`shoal explain` as a function call, whose result shows itself in a notebook.

It knows the parts that explain and show; it must not know how anything is found out.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from shoal.core.errors import UsageError
from shoal.jobs.options import STDIN, JobOptions
from shoal.preview.command import explain as explain_job
from shoal.preview.facts import Explanation
from shoal.preview.options import ExplainOptions
from shoal.preview.page import page
from shoal.preview.words import lines, to_json

FRAME = 640  # pixels: a page in a notebook scrolls beyond that


class Explained:
    """What a job will do: `facts` has every number; printed it is the command's text, in a notebook its page."""

    def __init__(self, facts: Explanation) -> None:
        self.facts = facts

    def __repr__(self) -> str:
        return "\n".join(f"{name:<10}{words}" for name, words in lines(self.facts))

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its style is for the whole page, and must not be for the notebook's."""
        style = f"width: 100%; height: {FRAME}px; border: 0"
        return f'<iframe srcdoc="{escape(self.html)}" style="{style}"></iframe>'

    @property
    def html(self) -> str:
        """One page with everything it needs."""
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
    sample: int | None = None,
    **options: Any,
) -> Explained:
    """Say what `shoal.run` with these options would do with the file `input`. Needs no weights, but for a `sample`.

    `options` are the fields of JobOptions: model, prompt, chat, body, memory, …; the others are the command's flags.
    """
    if Path(input) == STDIN:
        raise UsageError("shoal.explain reads a file; standard input is the command's: shoal explain -i -")
    job = JobOptions(input=Path(input), output=Path(os.devnull), **options)  # nothing is answered
    return Explained(explain_job(ExplainOptions(job, None, answer_tokens, price_per_hour, watts, calibrate, sample)))
