"""Calls that have failed while servers answered others, kept from run to run: a killed job that has only such rows left
is to end with their failures, and not to wait for a server that answers nothing any more.

It must not know servers, nor when a call is given up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

from shoal.core.types import Request
from shoal.jobs.journal import Journal
from shoal.remote.words import Call

NOTE = "blamed"  # key in the journal


class Blamed:
    """Changed by the job's loop alone."""

    def __init__(self, journal: Journal, done: Callable[[int], bool]) -> None:
        """`done` says whether the row of a line has ended: then it is forgotten."""
        self._journal, self._done = journal, done
        self._ids: set[str] = set(json.loads(journal.meta(NOTE) or "[]"))

    def add(self, ids: Iterable[str]) -> None:
        """These have failed so now; the next commit keeps it."""
        if fresh := set(ids) - self._ids:
            self._ids = {id for id in self._ids | fresh if not self._done(int(id.partition(".")[0]))}
            self._journal.note(NOTE, json.dumps(sorted(self._ids)))

    def marked(self, requests: Iterable[Request]) -> list[Request]:
        """The same requests; those that have failed so say it."""
        return [replace(one, blamed=True) if isinstance(one, Call) and one.id in self._ids else one for one in requests]
