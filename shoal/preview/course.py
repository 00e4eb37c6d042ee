"""A job on its way: the foretold schedule with the lengths learnt so far, scaled by how long it really took to here.

It knows work, costs and what rows have come to; it must not know who asks, nor read a clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.core.config import EngineConfig
from shoal.jobs.foretold import Foretold, Tail
from shoal.jobs.plan_order import Floats
from shoal.jobs.plan_sort import Ints
from shoal.jobs.supply import WINDOW
from shoal.preview.bulk import in_bulk
from shoal.preview.forecast import work_of
from shoal.preview.look import Served
from shoal.preview.paperwork import Paperwork
from shoal.sched.cost import MeasuredCost

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly: one fixed quantile for each prompt
FEW = 8  # answers that must have ended of themselves or at their limits before lengths are learnt from them
RECENT = 2_000  # answers that lengths are learnt from
UNITS = 20_000  # prompts walked at a time: of more, one in so many
TURNS = 60  # of a fit
NARROW = 0.05  # the least deviation of the logarithms of lengths
CLEAR = 3.0  # by which the logarithm of the likelihood must be better where some answers never end
TRUST = 0.02  # of the whole schedule: what was foretold weighs as if so much of it had passed as foretold


@dataclass(frozen=True, slots=True)
class Rates:
    """What a schedule is priced by."""

    cost: MeasuredCost
    config: EngineConfig
    blocks: int
    own: Paperwork  # of the job's own process, as far as no core is left for it


class Learnt:
    """How long answers are that may end anywhere, by those that have ended and those that have not yet.

    An answer that ran into its limit, or runs still, says only that it is longer than that: a product-limit estimate
    (Kaplan, Meier 1958) as far as ends are known, and beyond that the tail of what fits them best: lengths are
    log-normal, but for a share that never ends (Boag 1949), if ends say clearly that there is one. They cannot say
    what those will do that have run for longer than anybody who has ended: `tail` looks at both extremes.
    """

    def __init__(self, ended: Sequence[int], cut: Sequence[bool], running: Floats) -> None:
        """`cut`: whether an ended answer was cut off at its limit; `running`: tokens of those that run."""
        lengths, whole = np.asarray(ended, dtype=np.int64), ~np.asarray(cut, dtype=np.bool_)
        self.ends, deaths = np.unique(lengths[whole], return_counts=True)
        seen = np.sort(np.concatenate([lengths, running]))
        at_risk = len(seen) - np.searchsorted(seen, self.ends)
        left = np.cumprod(1.0 - deaths / np.maximum(at_risk, 1), dtype=np.float64)
        self.left: Floats = left  # share that is longer than each end
        self._beyond = max(float(seen[-1]), 1.0) if len(seen) else 1.0  # nobody has ended later
        longer = np.concatenate([lengths[~whole], running])
        self._fit = fit(lengths[whole], longer) if len(self.ends) else Fit(0.0, 1.0)

    def lengths(self, shares: Floats, tail: Tail = "fit") -> Floats:
        """The lengths that these shares of all answers exceed. Those longer than any that is known to have ended are
        as what fits has them, or end at once, or never."""
        if not len(self.ends):
            return np.full(len(shares), np.inf if tail != "least" else self._beyond)
        place = np.searchsorted(-self.left, -shares, side="left")
        known = self.ends[np.minimum(place, len(self.ends) - 1)].astype(np.float64)
        if tail == "fit":
            grid = self._beyond * np.geomspace(1.0, 1e4, 500)
            over = self._fit.longer(grid)
            over = np.maximum.accumulate((over * float(self.left[-1]) / max(over[0], 1e-300))[::-1])
            unknown = np.where(shares < over[0], np.inf, np.interp(shares, over, grid[::-1]))
        else:
            unknown = np.full(len(shares), self._beyond if tail == "least" else np.inf)
        return np.where(place < len(self.ends), known, unknown)


def _above(points: Floats) -> Floats:
    """The share of a normal distribution above each point."""
    return np.array([0.5 * math.erfc(point / math.sqrt(2.0)) for point in points.tolist()])


@dataclass(frozen=True, slots=True)
class Fit:
    """Mean and deviation of the logarithms of lengths, and the share of answers that never end by themselves."""

    middle: float
    spread: float
    never: float = 0.0

    def longer(self, lengths: Floats) -> Floats:
        """The share that is longer than each of these."""
        return self.never + (1.0 - self.never) * _above((np.log(lengths) - self.middle) / self.spread)

    def likelihood(self, ended: Floats, longer: Floats) -> float:
        """The logarithm of how likely these ends are, each as a whole number, and these that are longer."""
        ends = self.longer(ended - 0.5) - self.longer(ended + 0.5)
        return float(np.log(np.maximum(np.concatenate([ends, self.longer(longer)]), 1e-300)).sum())


def fit(ended: Ints, longer: Floats) -> Fit:
    """What fits best, of lengths of which some are known to be `longer` alone. That some never end is believed only
    when it is clear: few early ends fit both, and say nothing of what comes later."""
    ends, lasts = np.maximum(ended, 1).astype(np.float64), np.maximum(longer, 1).astype(np.float64)
    logs, bounds = np.log(ends), np.log(lasts)
    plain, mixed = _maximized(logs, bounds, 0.0), _maximized(logs, bounds, 0.5)
    return mixed if mixed.likelihood(ends, lasts) > plain.likelihood(ends, lasts) + CLEAR else plain


def _maximized(logs: Floats, bounds: Floats, never: float) -> Fit:
    """Expected and maximized by turns (Dempster, Laird, Rubin 1977); a share of none stays none."""
    middle, spread = float(logs.mean()), max(float(logs.std()), 0.5)
    for _ in range(TURNS):
        points = (bounds - middle) / spread
        above = _above(points)
        ends = (1.0 - never) * above / np.maximum(never + (1.0 - never) * above, 1e-300)  # share of each that will end
        density = np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
        ratio = np.maximum(density / np.maximum(above, 1e-300), points)  # the mean of what is above
        first = middle + spread * ratio
        second = middle**2 + 2 * middle * spread * ratio + spread**2 * (1 + points * ratio)
        total = len(logs) + float(ends.sum())
        middle = (float(logs.sum()) + float((ends * first).sum())) / total
        square = (float((logs**2).sum()) + float((ends * second).sum())) / total
        spread = math.sqrt(max(square - middle**2, NARROW**2))
        never = 1.0 - total / (len(logs) + len(bounds)) if never else 0.0
    return Fit(middle, spread, never)


class Course:
    """The course of one job. It is told what ends, and says what is left."""

    def __init__(self, said: Foretold, work: Served, rates: Rates | None) -> None:
        """Without `rates` nobody can say."""
        self.said, self._work, self._rates = said, work, rates
        self._answers = work.limits.copy()
        samples = work.units["samples"].astype(np.int64)
        rows = self._rows = np.ascontiguousarray(work.units["row"])  # of many rows a search in a column copies it
        top = int(rows.max()) + 1 if len(rows) else 0
        self._requests: Ints = np.bincount(rows, weights=samples, minlength=top).astype(np.int64)
        self._open = np.zeros(len(work.units), dtype=np.bool_)  # units whose answers nobody knows yet
        self._open[work.order] = ~work.certain[work.order]
        self._ended: list[int] = []
        self._cut: list[bool] = []
        self._tokens = 0  # of rows that have ended

    def ended(self, row: int, tokens: int) -> None:
        """A row of the plan has ended, with so many tokens of output over all its prompts and samples."""
        self._tokens += tokens
        low, high = np.searchsorted(self._rows, [row, row + 1])
        if low == high or not self._open[low:high].any():
            return
        each = round(tokens / max(int(self._requests[row]), 1))
        self._answers[low:high] = np.minimum(each, self._work.limits[low:high])
        self._open[low:high] = False
        self._ended.append(each)
        self._cut.append(each >= int(self._work.limits[low:high].min()))

    def left(
        self, seconds: float, tokens: int, output: int, running: Sequence[float], tail: Tail = "fit"
    ) -> float | None:  # fmt: skip
        """Seconds until the last row ends, when `tokens`, of them `output` of answers, were computed in `seconds`
        and each of the `running` requests has run for so many. Nobody knows how long those run that have run for
        longer than any that have ended: `tail` has them do what fits, or end at once, or run to their limits."""
        rates = self._rates
        if rates is None or (self._open.any() and len(self._ended) < FEW):
            return None
        work = work_of(self._work, self._guess(running, output, tail))
        every = -(-len(work) // UNITS)
        time = in_bulk(work.thin(every), rates.cost, rates.config, rates.blocks).times(every)
        done, passed = (np.array(column) for column in zip(*time.course, strict=True))
        whole = float(passed[-1])
        job = rates.own.seconds(len(work), float(work.answers.sum()), time.steps)
        ahead = min(rates.own.opening * min(len(work), WINDOW), job)  # so many are handed over before the first step
        share = 1.0 + (job - ahead) / max(whole, 1e-9)  # the rest of the job's own work goes on beside all steps
        here = ahead + share * float(np.interp(min(tokens, float(done[-1])), done, passed))
        whole = ahead + share * whole
        trust = TRUST * whole
        return max(whole - here, 0.0) * (seconds + trust) / (here + trust)

    def _guess(self, running: Sequence[float], output: int, tail: Tail) -> Ints:
        """Tokens of every unit's answer: known ones, and the others spread as those learnt from."""
        if not self._open.any():
            return self._answers
        ages = np.asarray(running, dtype=np.float64)  # every step gives each that runs a token
        tokens = max(output - self._tokens, 0) * ages / max(float(ages.sum()), 1e-9)
        learnt = Learnt(self._ended[-RECENT:], self._cut[-RECENT:], tokens)
        shares: Floats = 1.0 - np.arange(1, len(self._answers) + 1, dtype=np.float64) * GOLDEN % 1.0
        drawn = np.minimum(np.maximum(np.ceil(learnt.lengths(shares, tail)), 1), self._work.limits)
        return np.where(self._open, drawn, self._answers).astype(np.int64)
