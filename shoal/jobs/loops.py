"""Answers that repeat themselves: whether the last tokens of a text are one piece over and over.

It knows tokens and the field of a row that asks for it, and nothing else. Exact: a text loops with a period when each
of its last tokens is the one a period before it, over a stretch that the rule says.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.errors import RowError
from shoal.core.types import Tokens
from shoal.jobs.body import RepetitionDetection


@dataclass(frozen=True, slots=True)
class Rule:
    """What counts as a loop: a piece of `shortest` to `longest` tokens, `times` over and at least `least` tokens."""

    shortest: int
    longest: int
    times: int
    least: int = 0

    def period(self, tokens: Tokens) -> int:
        """The length of the piece that the text ends in, the shortest one; 0 when it does not loop."""
        if len(tokens) < self.least:
            return 0
        for period in range(self.shortest, min(self.longest, len(tokens) // self.times) + 1):
            stretch = max(self.times * period, self.least)
            if stretch > len(tokens):
                continue
            if tokens[-1] == tokens[-1 - period] and tokens[-stretch:-period] == tokens[period - stretch :]:
                return period
        return 0

    def end(self, before: Tokens, more: Tokens) -> int:
        """How many of `more` tokens after `before` bring the text into a loop; -1 when they do not. However the tokens
        are cut into parts, the text ends at the same one."""
        text = before[-(max(self.times * self.longest, self.least)) :]
        for number, token in enumerate(more, 1):
            text.append(token)
            if self.period(text):
                return number
        return -1


LOOP = Rule(1, 128, 3, 64)
"""A loop worth a word in the report, when the answer ran into its limit with it. Among tokens drawn at random from only
two a text ends in one by chance less than once in 10**12 places."""


def rule_of(asked: RepetitionDetection | None) -> Rule | None:
    """What ends an answer that repeats itself, as its row says; None when nothing does. Raises RowError."""
    name = "repetition_detection"
    if asked is None or asked == RepetitionDetection():
        return None
    if asked.min_count < 2:
        raise RowError(f"{name} needs a min_count of at least 2: a piece that comes once is no repetition", param=name)
    shortest = max(1, asked.min_pattern_size)
    if shortest > asked.max_pattern_size:
        raise RowError(f"{name}: max_pattern_size must be at least 1 and at least min_pattern_size", param=name)
    return Rule(shortest, asked.max_pattern_size, asked.min_count)
