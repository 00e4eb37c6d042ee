"""A job without a model some of whose rows fail and run again: both commands, as a user gives them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from durable_job import MANIFEST, Job, payload

from shoal.core.clock import SimClock
from shoal.jobs.files import Files
from shoal.jobs.results import open_results
from shoal.jobs.retry import Again
from shoal.jobs.state import Begin, StateFolder, open_state, row_key
from shoal.jobs.swap import NOTE
from shoal.jobs.write import Order


class RetryJob:
    """Of its lines every third fails the first time; with `hopeless` every fifth fails by its own fault."""

    def __init__(self, root: Path, rows: int, hopeless: bool = True, order: Order = "input") -> None:
        self.root, self.lines, self.hopeless, self.order = root, range(1, rows + 1), hopeless, order
        self.out, self.errors = root / "answers.jsonl", root / "answers.errors.jsonl"
        self.every = False

    def run(self, files: Files) -> int:
        """`shoal run`, which may have ended before, and `shoal retry`."""
        with open_state(self.out, self.errors, files) as state:
            if state.begin(MANIFEST) is not Begin.FINISHED:
                self._answer(state, files)
        self.retry(files)
        return 3

    def retry(self, files: Files) -> None:
        """`shoal retry`, of all rows that failed if `every`."""
        chosen = Again(self.every)
        with open_state(self.out, self.errors, files) as state:
            if state.begin(MANIFEST) is not Begin.FINISHED or not chosen.idle(state.path):
                self._answer(state, files, chosen)

    def _answer(self, state: StateFolder, files: Files, chosen: Again | None = None) -> None:
        clock = SimClock()
        args = (state.path, self.out, self.errors, self.lines, self.order, files, clock)
        opened = partial(open_results, *args)
        with opened() if chosen is None else chosen.open(opened, state) as results:
            again = bool(results.journal.meta(NOTE))
            for line in self.lines:
                if results.done(line):
                    continue
                code = "" if again or line % 3 else "internal"
                code = "invalid_request" if self.hopeless and line % 5 == 0 else code
                key, text = row_key(MANIFEST, b"body %d" % line), payload(line) + code.encode()
                noted = {"code": code} if code else {}
                results.put(line, key, "failed" if code else "ok", text, noted)
                clock.advance_to(clock.now() + 0.4)
                results.tick(clock.now())
            results.finish()
        state.finish(3)

    def journalled(self) -> set[int]:
        """Nothing that was promised: rows are forgotten to run again."""
        return set()

    def final(self) -> dict[str, bytes]:
        """Return every file that a finished job leaves, but the journal and the lock."""
        return Job(self.root, self.lines, self.lines).final()
