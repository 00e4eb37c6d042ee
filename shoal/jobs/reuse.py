"""What a job need not compute: rows that its cache knows, and rows that ask for what another row asks for.

It knows the plan, the copies and the cache; it must not know how an answer becomes a line, nor where lines are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np

from shoal.jobs.answer import PromptAnswers, count_tokens
from shoal.jobs.body import PassedBody
from shoal.jobs.cache import AnswerCache, Kept
from shoal.jobs.copies import Copies, free_stats
from shoal.jobs.feed import Ended, Feed
from shoal.jobs.part import loop_period
from shoal.jobs.plan import Unit
from shoal.jobs.results import Results

ROUND = 256  # rows looked up between two looks at the clock


class Reuse:
    """Decides what becomes of rows that are over. Changed by the job's loop alone."""

    def __init__(self, feed: Feed, results: Results, cache: AnswerCache | None) -> None:
        self.copies = Copies(feed, results.done)
        self.recalled = 0  # rows of this run that the cache knew
        self._feed, self._done, self._cache = feed, results.done, cache
        earlier = results.journal.noted("cache") if results.journal.committed else []
        self._known = feed.plan.rows_of(earlier).tolist()  # rows that have cost nothing, of all runs

    def recall(self) -> Iterator[list[Ended]]:
        """The rows that the cache knows wholly, some at a time; in file order. At the end the others have a new plan:
        what shared a prefix with a row that is not run shares it with another."""
        plan = self._feed.plan
        if self._cache is not None:
            found: list[Ended] = []
            wanted = plan.units_by_row(lambda row: not self._done(plan.line(row)))
            for number, (row, units) in enumerate(groupby(wanted, lambda unit: unit.row), 1):
                answers = _answers(list(units), self._cache)
                if answers is not None:
                    found.append(self._ended(row, answers))
                    self._known.append(row)
                if number % ROUND == 0:
                    self.recalled += len(found)
                    yield found
                    found = []
            self.recalled += len(found)
            yield found
        if self._known:
            self._feed.replan(plan.without(np.array(self._known)))

    def add(self, ended: Ended, now: float) -> list[Ended]:
        """A row that was computed or recalled: what can be noted of it now."""
        if self._cache is not None and "cache" not in ended.stats:
            keep(ended, self._cache, now)
        return self.copies.add(ended)

    def _ended(self, row: int, answers: tuple[PromptAnswers, ...]) -> Ended:
        line, raw, spec = self._feed.read(row)
        samples = [sample for answer in answers for sample in answer.samples]
        prompt, output = count_tokens(spec, (answer.prompt for answer in answers), samples)
        stats: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": output}
        if loop := max((loop_period(spec, sample) for sample in samples), default=0):
            stats["loop_period"] = loop
        ended = Ended(row, line, raw, spec, answers, None, stats)
        return replace(ended, stats=free_stats(ended) | {"cache": True})


def keep(ended: Ended, cache: AnswerCache, now: float) -> None:
    """Put what a row came to into the cache; nothing of a row that failed, nor of one that leaves the model to a
    server: tomorrow it may have another."""
    nameless = isinstance(ended.spec.body, PassedBody) and not ended.spec.body.model
    if ended.error is None and not nameless:
        for ask, answer in zip(ended.asks, ended.answers, strict=False):
            for number, sample in enumerate(answer.samples):
                cache.put(ask, number, Kept(sample, () if number else answer.scores), now)


def forget(ended: Ended, cache: AnswerCache) -> None:
    """Remove what the cache has of a row that was found to be wrong."""
    for ask in ended.asks:
        for number in range(ended.spec.n):
            cache.forget(ask, number)


def _answers(units: list[Unit], cache: AnswerCache) -> tuple[PromptAnswers, ...] | None:
    """The answers of a row; None when one is missing. `units` are those of its prompts, in order."""
    answers = []
    for unit in units:
        kept = []
        for number in range(unit.samples):
            found = cache.get(unit.ask, number) if unit.ask else None
            if found is None:
                return None
            kept.append(found)
        answers.append(PromptAnswers(unit.tokens, [one.sample for one in kept], kept[0].scores))
    return tuple(answers)
