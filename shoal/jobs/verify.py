"""Proof that answers are what computing them gives: a sample of the rows runs again, and every byte is compared.

It knows rows by their lines and what the journal has of them; it must not know how rows are run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator

from shoal.jobs.journal import Journal
from shoal.jobs.plan import Plan, Unit


def choose(journal: Journal, share: float) -> list[int]:
    """Input lines to compute again: a share of the answered rows that were computed and one of those that were not,
    at least one of each; the same ones whenever it is asked."""
    groups: tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]] = ([], [])
    for line, status, stats in journal.stats():
        if status == "ok":
            noted = json.loads(stats)
            luck = hashlib.blake2b(b"%d" % line, digest_size=8).digest()
            groups["copy_of" in noted or "cache" in noted].append((luck, line))
    chosen = [line for group in groups for _, line in sorted(group)[: math.ceil(share * len(group))]]
    return sorted(chosen)


class Check:
    """Compares rows that ran again with what the journal has of them. Changed by the job's loop alone."""

    def __init__(self, journal: Journal, lines: list[int]) -> None:
        self._journal = journal
        self._lines = lines
        self.rows = 0  # compared
        self.differ: list[int] = []  # lines, in the order they were found

    def units(self, plan: Plan) -> Iterator[Unit]:
        """What is to be run."""
        for row in plan.rows_of(self._lines).tolist():
            yield from plan.units_like(row)

    def compare(self, line: int, payload: bytes) -> bool:
        """Whether a row came to the same again."""
        self.rows += 1
        if self._journal.payload(line) == payload:
            return True
        self.differ.append(line)
        return False
