"""What the user wants to know of a job before it runs. It must not know how it is found out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import UsageError
from shoal.jobs.bill import check_rates
from shoal.jobs.options import JobOptions


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """One question about a job."""

    job: JobOptions
    html: Path | None = None  # a page is written here
    answer_tokens: int | None = None  # expected of answers whose length nobody fixes
    price: float | None = None  # of an hour of this machine
    watts: float | None = None  # of this machine while it works
    calibrate: bool = False  # measure this machine again
    sample: int | None = None  # rows that are run first, to learn how long answers are

    def __post_init__(self) -> None:
        check_rates(self.price, self.watts)
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise UsageError(f"--answer-tokens is {self.answer_tokens}: give at least 1")
        if self.sample is not None and self.sample < 1:
            raise UsageError(f"--sample is {self.sample}: give at least 1")
        if self.sample is not None and self.answer_tokens is not None:
            raise UsageError("--sample measures what --answer-tokens guesses: leave one of them out")


def rows_of(file: Path | None, flag: Path | None, typed: bool) -> Path:
    """The rows' file: given by its place, or by the flag; `typed` is whether the flag is on the command line too."""
    if file is not None and flag is not None and typed:
        raise UsageError(f"{file} and --input {flag} are both given: leave one of them out")
    found = file or flag
    if found is None:
        raise UsageError("there is nothing to read: give FILE or --input FILE; - is standard input")
    return found
