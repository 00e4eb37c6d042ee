"""How long answers are going to be, learnt from those that have ended.

It knows finished lengths by group; it must not know the length of anything that still runs.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from shoal.core.sequence import Sequence

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly: one fixed quantile for each sequence
FEW = 8  # finished answers below which nothing is learnt from them
ENOUGH = 50  # … of a group from which it is a distribution of its own; below, the one of all groups stands for it
EVERYBODY = "\0"  # the group of all: no name of a group has a NUL

Lengths = NDArray[np.float64]


class LengthEstimator:
    """What is expected of a sequence's whole output length [tokens]: always more than it has produced, and at most
    its limit. Whoever studies an estimator overrides `quantile`, and `draw` where there is a faster way."""

    def quantile(self, seq: Sequence, share: float) -> int:
        """The length that this share of such answers does not exceed."""
        raise NotImplementedError

    def expect(self, seq: Sequence) -> int:
        """One length for `seq`: its own quantile, fixed by its number, so that many together are as they will be."""
        return self.quantile(seq, seq.number * GOLDEN % 1.0)

    def draw(self, seqs: Seq[Sequence], count: int, luck: np.random.Generator) -> Lengths:
        """`count` futures of all of them together: an array of lengths [count, len(seqs)]."""
        shares = luck.random((count, len(seqs)))
        return np.array([[self.quantile(s, float(u)) for s, u in zip(seqs, row, strict=True)] for row in shares])

    def look(self, running: Iterable[Sequence]) -> None:
        """Told what runs, by whoever is about to ask: those are answers at least as long as what they have produced."""

    def learn(self, seq: Sequence) -> None:
        """An answer has ended by itself or at its limit."""

    def forget(self, seq: Sequence) -> None:
        """An answer was given up: its length says nothing."""


def within(seq: Sequence, length: float) -> int:
    """A length as an estimate may be: above what is produced, not above the limit."""
    return min(seq.request.sampling.max_tokens, max(seq.produced + 1, round(length)))


def known(seq: Sequence) -> int | None:
    """The length where it needs no estimate: nothing but the limit can end it, or its request came with a guess."""
    sampling, produced = seq.request.sampling, seq.produced
    if not sampling.stop or produced >= sampling.max_tokens:
        return sampling.max_tokens
    guess = seq.request.guess
    return within(seq, guess) if guess is not None and guess > produced else None


class Constant(LengthEstimator):
    """Every answer is `length` long, or twice what it has produced when it has got there; None: as long as it may."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def quantile(self, seq: Sequence, share: float) -> int:
        """The constant."""
        if self.length is None:
            return seq.request.sampling.max_tokens
        return within(seq, self.length if seq.produced < self.length else 2 * seq.produced)


class MeanOfGroup(LengthEstimator):
    """The mean of the group's answers so far, as a profiling run would give it (BatchLLM, arXiv 2412.03594)."""

    def __init__(self, prior: int = 512) -> None:
        self.prior = prior
        self._sums: dict[str, tuple[int, int]] = {}

    def quantile(self, seq: Sequence, share: float) -> int:
        """The mean, whatever the share."""
        given = known(seq)
        if given is not None:
            return given
        total, count = self._sums.get(seq.request.group, (0, 0))
        mean = total / count if count else self.prior
        return within(seq, mean if seq.produced < mean else 2 * seq.produced)

    def learn(self, seq: Sequence) -> None:
        """One more."""
        total, count = self._sums.get(seq.request.group, (0, 0))
        self._sums[seq.request.group] = total + seq.produced, count + 1


class LengthHistory(LengthEstimator):
    """The last `window` finished lengths of a group, as a distribution conditioned on what is already produced.

    Past-Future (arXiv 2507.10150, section on the output length distribution): P(length | length > produced), drawn
    from the points produced, h1 … hm, limit by straight lines. With `cold` half of the window is answers as long as may
    be, each one's own limit, until others have taken their places: the paper's conservative start; else `prior` stands
    for the first few. A group with few answers is taken to be like all; of `most` groups, those that learnt last.
    `condition=False` forgets what is produced: the control.
    """

    def __init__(
        self, window: int = 200, prior: int = 512, condition: bool = True, cold: bool = False, most: int = 4096
    ) -> None:
        self.window, self.prior, self.condition, self.cold, self.most = window, prior, condition, cold, most
        self._recent: dict[str, deque[int]] = {}
        self._sorted: dict[str, list[int]] = {}
        self._arrays: dict[str, Lengths] = {}  # the sorted ones, as long as nothing is added

    def observe(self, group: str, length: int) -> None:
        """An answer of the group ended after `length` tokens."""
        for name in (group, EVERYBODY):
            recent = self._recent[name] = self._recent.pop(name, deque())
            ordered = self._sorted.setdefault(name, [])
            recent.append(length)
            insort(ordered, length)
            if len(recent) > self.window:
                del ordered[bisect_right(ordered, recent.popleft()) - 1]
            self._arrays.pop(name, None)
        if len(self._recent) > self.most + 1:
            oldest = next(iter(self._recent))
            for kept in (self._recent, self._sorted, self._arrays):
                kept.pop(oldest, None)

    def _longest(self) -> int:
        """Places of the window that answers as long as may be still have."""
        ended = len(self._recent.get(EVERYBODY, ()))
        return max(0, min(self.window // 2, self.window - ended)) if self.cold else 0

    def learn(self, seq: Sequence) -> None:
        """One more of its group."""
        self.observe(seq.request.group, seq.produced)

    def _like(self, group: str) -> str:
        return group if len(self._sorted.get(group, ())) >= min(ENOUGH, self.window) else EVERYBODY

    def quantile(self, seq: Sequence, share: float) -> int:
        """Certain where nothing but the limit can end it. Otherwise that quantile of the lengths above what it has
        produced; the prior where fewer than eight answers have ended."""
        given = known(seq)
        if given is not None:
            return given
        most, produced = seq.request.sampling.max_tokens, seq.produced
        ordered = self._sorted.get(self._like(seq.request.group), [])
        longest = self._longest()
        if len(ordered) < FEW and not longest:
            return min(most, self.prior if produced < self.prior else 2 * produced)
        past = produced if self.condition else 0
        above = ordered[bisect_right(ordered, past) :]
        points = [past, *above, *[most] * max(longest, not above or most > above[-1])]
        place = share * (len(points) - 1)
        low = int(place)
        value = points[low] + (place - low) * (points[min(low + 1, len(points) - 1)] - points[low])
        return within(seq, value)

    def draw(self, seqs: Seq[Sequence], count: int, luck: np.random.Generator) -> Lengths:
        """The same quantiles at random places, all sequences of a group at once."""
        shares = luck.random((count, len(seqs)))
        found = np.empty((count, len(seqs)))
        by_group: dict[str, list[int]] = {}
        for i, seq in enumerate(seqs):
            by_group.setdefault(seq.request.group, []).append(i)
        for group, members in by_group.items():
            found[:, members] = self._draw_alike(self._like(group), [seqs[i] for i in members], shares[:, members])
        return found

    def _draw_alike(self, group: str, seqs: Seq[Sequence], shares: Lengths) -> Lengths:
        produced = np.array([float(len(s.tokens) - s.num_prompt) for s in seqs])
        most = np.array([float(s.request.sampling.max_tokens) for s in seqs])
        if group not in self._arrays:
            self._arrays[group] = np.array(self._sorted.get(group, []), float)
        ordered = self._arrays[group]
        longest = self._longest()
        if len(ordered) < FEW and not longest:
            drawn = np.where(produced < self.prior, float(self.prior), 2 * produced) + 0 * shares
        else:
            past = produced if self.condition else 0 * produced
            first = np.searchsorted(ordered, past, "right")
            ends = np.where(most > ordered[-1:].max(initial=0.0), 1, np.where(first == len(ordered), 1, 0))
            ends = np.maximum(ends, longest)
            place = shares * (len(ordered) - first + ends)
            low = np.floor(place)
            rim = np.concatenate([ordered, [0.0]])  # its last place stands for each one's own limit

            def point(i: Lengths) -> Lengths:
                index = (first + i - 1).astype(np.int64)
                value = np.where(index >= len(ordered), most, rim[np.clip(index, 0, len(ordered))])
                return np.where(i == 0, past, value)

            begin = point(low)
            drawn = begin + (place - low) * (point(low + 1) - begin)
        if not all(s.stop and s.request.guess is None for s in seqs):
            sure = [known(s) for s in seqs]
            drawn = np.where([k is not None for k in sure], [float(k or 0) for k in sure], drawn)
        found: Lengths = np.minimum(most, np.maximum(produced + 1, np.rint(drawn)))
        return found


class Survival(LengthEstimator):
    """Kaplan and Meier's curve over the last `window` finished lengths and all that runs: an answer that still runs
    is known to be longer than what it has produced. Without them the long ones, which end late, are missed right
    after the lengths have changed."""

    def __init__(self, window: int = 200, prior: int = 512) -> None:
        self.window, self.prior = window, prior
        self._recent: dict[str, deque[int]] = {}
        self._running: dict[str, list[int]] = {}
        self._curves: dict[str, tuple[Lengths, Lengths]] = {}  # lengths, and the share of answers that are longer

    def look(self, running: Iterable[Sequence]) -> None:
        """Take down what has been produced by those that have not ended."""
        self._running = {}
        for seq in running:
            for name in (seq.request.group, EVERYBODY):
                self._running.setdefault(name, []).append(seq.produced)
        self._curves.clear()

    def learn(self, seq: Sequence) -> None:
        """One more of its group."""
        for name in (seq.request.group, EVERYBODY):
            self._recent.setdefault(name, deque(maxlen=self.window)).append(seq.produced)
        self._curves.clear()

    def _curve(self, group: str) -> tuple[Lengths, Lengths]:
        if group not in self._curves:
            ended = np.sort(np.array(self._recent.get(group, ()), float))
            running = np.sort(np.array(self._running.get(group, ()), float))
            lengths, deaths = np.unique(ended, return_counts=True)
            at_risk = len(ended) - np.searchsorted(ended, lengths, "left")
            at_risk = at_risk + len(running) - np.searchsorted(running, lengths, "left")
            longer = np.cumprod(1.0 - deaths / at_risk).astype(np.float64)
            self._curves[group] = lengths, longer
        return self._curves[group]

    def quantile(self, seq: Sequence, share: float) -> int:
        """Where the curve, from what is produced on, has fallen by that share; the limit if it never does."""
        given = known(seq)
        if given is not None:
            return given
        group = seq.request.group
        group = group if len(self._recent.get(group, ())) >= min(ENOUGH, self.window) else EVERYBODY
        lengths, longer = self._curve(group)
        produced, most = seq.produced, seq.request.sampling.max_tokens
        if len(self._recent.get(group, ())) < FEW:
            return min(most, self.prior if produced < self.prior else 2 * produced)
        past = int(np.searchsorted(lengths, produced, "right"))
        alive = float(longer[past - 1]) if past else 1.0
        at = past + int(np.searchsorted(-longer[past:], -alive * (1.0 - share), "left"))
        return within(seq, float(lengths[at])) if at < len(lengths) else most
