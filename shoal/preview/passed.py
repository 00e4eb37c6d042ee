"""A job over servers before it is sent: its rows, what their texts share, what they may cost, and what nobody knows.

It must not know engines, memory or times, and asks no server anything. Reading, checking and planning are the run's own
code. Tokens are the server's to count: of them there are only ranges, by the bytes of the texts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from shoal.core.errors import UsageError
from shoal.jobs.bill import Prices, Range
from shoal.jobs.files import DiskFiles
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.passing_encode import UNIT, asked_of
from shoal.jobs.plan import build_plan
from shoal.jobs.prepare import ServedWords, open_served
from shoal.jobs.read import Source
from shoal.jobs.spool import open_source
from shoal.preview.facts import Bad, Lengths, Rows, bad_rows, lengths
from shoal.preview.look import Served, served
from shoal.preview.options import ExplainOptions
from shoal.show.prefixes import Forest, largest

NO_CONTEXT = 1 << 31  # tokens: the server knows its own
BYTES = 2.0, 6.0  # of a text for each of its tokens: most tokenizers and languages are between these
UNKNOWN = (
    "the prompts' tokens, before a server has counted them (a run's report has its count)",
    "whether a prompt fits the model's context, and whether the model takes all that a row asks for",
    "how long answers are that may end anywhere",
    "time, for it is the servers'",
)


@dataclass(frozen=True, slots=True)
class Passed(Served):
    """A plan of calls as arrays: a token is UNIT bytes of text."""

    words: ServedWords
    source: Source
    seconds: float  # spent on all this


class Calls(msgspec.Struct, frozen=True):
    """What is asked of the servers, in the end."""

    models: dict[str, int]  # rows by the model that they name; "" are those that leave it to the server
    answers: int  # that rows ask for: choices, and vectors
    limit: int  # output tokens at most, of rows that say so
    open: int  # rows that do not


class Foreseen(msgspec.Struct, frozen=True):
    """A job before it is sent. Texts are in bytes."""

    input: str
    servers: tuple[str, ...]
    rows: Rows
    bad: tuple[Bad, ...]
    calls: Calls
    texts: Lengths  # of prompts, of rows that are sent
    shared: int  # bytes of them that the text before has, in the order in which they are sent
    forest: Forest
    prompt_tokens: Range
    output_tokens: Range | None  # None: nobody says where some answers end
    cost: Range | None  # None: nobody gave a price, or an answer may have any length
    seconds: float  # to find all this out
    unknown: tuple[str, ...] = UNKNOWN


@contextmanager
def look_passed(options: JobOptions) -> Iterator[Passed]:
    """Read and plan a job over servers as `shoal run` with these options would."""
    began = time.monotonic()
    words, files = open_served(options), DiskFiles()
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        folder = Path(scratch)
        with open_source(options.input, folder, files, sys.stdin.buffer) as source:
            order = "input" if options.order is Order.INPUT else words.encoder.order
            plan = build_plan(source, words.encoder, folder / "plan", order, words.encoder.fingerprint)
            found = served(plan, NO_CONTEXT)
            fields = {name: getattr(found, name) for name in Served.__slots__}
            yield Passed(**fields, words=words, source=source, seconds=time.monotonic() - began)


def foresee(options: ExplainOptions, prices: Prices | None) -> Foreseen:
    """All that can be said of a job over servers before it is sent."""
    ours = (
        ("--html", options.html),
        ("--price-per-hour", options.price),
        ("--watts", options.watts),
        ("--sample", options.sample),
    )
    for flag, value in ours:
        if value is not None:
            raise UsageError(f"{flag} is for an engine of ours, and --endpoint has none: leave it out")
    with look_passed(options.job) as passed:
        plan, calls = passed.plan, _calls(passed)
        texts = UNIT * passed.units["length"].astype(np.int64)
        total = int(texts.sum())
        prompt = round(total / BYTES[1]), round(total / BYTES[0])
        output = _output(calls, options.answer_tokens)
        return Foreseen(
            input="standard input" if str(options.job.input) == "-" else str(options.job.input),
            servers=options.job.servers,
            rows=Rows(
                plan.num_rows, plan.num_rows - plan.num_bad - plan.num_copies, plan.num_copies, plan.num_bad, 0, 0,
                calls.open,
            ),
            bad=bad_rows(plan), calls=calls, texts=lengths(texts), shared=UNIT * int(passed.overlap.sum()),
            forest=largest(passed.prompts, passed.reach, Utf8()), prompt_tokens=prompt, output_tokens=output,
            cost=None if prices is None or output is None else prices.cost(prompt, output), seconds=passed.seconds,
        )  # fmt: skip


class Utf8:
    """What makes a text of units."""

    def decode(self, ids: list[int], /, *, skip_special: bool) -> str:
        """The text; what is cut off of a character at either end is left out."""
        return np.array(ids, dtype="<u2").tobytes().decode("utf-8", "ignore").rstrip("\0")


def _calls(passed: Passed) -> Calls:
    """What the rows that are sent ask for."""
    models, answers, limit, unlimited = Counter[str](), 0, 0, 0
    for row in np.unique(passed.units["row"]).tolist():
        where = passed.plan.row(row)
        spec = passed.words.encoder.parse(passed.source.read(where.offset, where.length))
        call = asked_of(spec)
        models[call.model] += 1
        answers += call.answers
        if call.limit is None:
            unlimited += 1
        else:
            limit += call.limit * call.answers
    return Calls(dict(models.most_common()), answers, limit, unlimited)


def _output(calls: Calls, expected: int | None) -> Range | None:
    """Output tokens from the fewest to the most, where somebody says where answers end."""
    if calls.open and expected is None:
        return None
    more = calls.open * (expected or 0)
    return (min(calls.answers, calls.limit + more), calls.limit + more)
