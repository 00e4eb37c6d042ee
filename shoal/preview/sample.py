"""How long answers are that may end anywhere, by a few rows run first: an ordinary job in a folder that is forgotten.

It knows how a job is run and what its answers look like; it must not know times, nor what lengths are good for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from shoal.core.errors import UsageError
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.plan_sort import Ints
from shoal.preview.course import GOLDEN, Learnt
from shoal.preview.look import Looked

FINISHED = (0, 3)  # exit codes of a job that has gone through all rows
_decode = msgspec.json.decode


class Runner(Protocol):
    """What runs a job to its end; the exit code."""

    def __call__(self, options: JobOptions) -> int: ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a sample has come to."""

    rows: int
    ended: tuple[int, ...]  # tokens of each answer
    cut: tuple[bool, ...]  # whether it ran into its limit

    def lengths(self, looked: Looked) -> Ints:
        """Tokens of every unit's answer, if the others are spread as those of the sample; known ones as they are."""
        learnt = Learnt(self.ended, self.cut, np.zeros(0))
        shares = 1.0 - np.arange(1, len(looked.limits) + 1, dtype=np.float64) * GOLDEN % 1.0
        drawn = np.minimum(np.maximum(np.ceil(learnt.lengths(shares)), 1), looked.limits)
        return np.where(looked.certain, looked.limits, drawn).astype(np.int64)


def sample(looked: Looked, options: JobOptions, count: int, run: Runner) -> Sampled | None:
    """Run so many rows, spread evenly over the plan; None where every length is known. UsageError where no row was
    answered, with the reason of the first."""
    chosen = choose(looked, count)
    if not len(chosen):
        return None
    with tempfile.TemporaryDirectory(prefix="shoal-sample-") as scratch:
        source, out = Path(scratch) / "rows.jsonl", Path(scratch) / "answers.jsonl"
        with source.open("wb") as file:
            for number in chosen.tolist():
                row = looked.plan.row(number)
                raw = looked.source.read(row.offset, row.length)
                assert raw is not None, "a row that is run was read"
                file.write(raw + b"\n")
        job = replace(options, input=source, output=out, order=Order.PLAN, openai=True, one_file=True, quiet=True)
        code = run(job)
        if code not in FINISHED:
            raise UsageError(
                f"the sampled rows were not all run (exit code {code}): explain without --sample, or again"
            )
        found = [_decode(line) for line in out.read_bytes().splitlines()]
    answered = [each["response"]["body"] for each in found if not each.get("error") and "x_shoal" not in each]
    lengths = [pair for body in answered for pair in _lengths(body)]
    if not lengths:
        raise UsageError(f"none of the {len(chosen)} sampled rows was answered: {_reason(found)}")
    ended, cut = zip(*lengths, strict=True)
    return Sampled(len(answered), ended, cut)


def choose(looked: Looked, count: int) -> Ints:
    """Rows with answers whose lengths nobody knows, at equal distances in the order in which they are served."""
    units = looked.units["row"][looked.order[~looked.certain[looked.order]]].astype(np.int64)
    _, first = np.unique(units, return_index=True)
    rows = units[np.sort(first)]
    count = min(count, len(rows))
    places = (np.arange(count) * 2 + 1) * len(rows) // (2 * max(count, 1))
    return rows[places]


def _lengths(body: Mapping[str, Any]) -> Iterator[tuple[int, bool]]:
    """Of each choice; where a row has several they share its tokens."""
    choices = body.get("choices", ())
    for choice in choices:
        yield round(body["usage"]["completion_tokens"] / len(choices)), choice["finish_reason"] == "length"


def _reason(found: list[Any]) -> str:
    for each in found:
        if each.get("response"):
            return str(each["response"]["body"]["error"]["message"])
    return "shoal run says why"
