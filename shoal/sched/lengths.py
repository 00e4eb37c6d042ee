"""How long answers are going to be, learnt from those that have ended.

It knows finished lengths by group; it must not know the length of anything that still runs.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

from shoal.core.sequence import Sequence

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly: one fixed quantile for each sequence


class LengthHistory:
    """The last `window` finished lengths of a group, as a distribution conditioned on what is already produced.

    Past-Future (arXiv 2507.10150, section on the output length distribution): P(length | length > produced), the
    window seeded so that a cold start is conservative.
    """

    def __init__(self, window: int = 200, prior: int = 512) -> None:
        self.window, self.prior = window, prior
        self._recent: dict[str, deque[int]] = {}
        self._sorted: dict[str, list[int]] = {}

    def observe(self, group: str, length: int) -> None:
        """An answer of the group ended after `length` tokens."""
        recent = self._recent.setdefault(group, deque())
        ordered = self._sorted.setdefault(group, [])
        recent.append(length)
        insort(ordered, length)
        if len(recent) > self.window:
            del ordered[bisect_right(ordered, recent.popleft()) - 1]

    def expect(self, seq: Sequence) -> int:
        """Expected output length of `seq` [tokens]: more than it has produced, at most its limit.

        Certain where nothing but the limit can end it. Otherwise the sequence's own quantile (fixed by its number)
        of the lengths above what it has produced; the prior where its group has fewer than eight.
        """
        sampling, produced = seq.request.sampling, seq.produced
        most = sampling.max_tokens
        if not sampling.stop or produced >= most:
            return most
        if seq.request.guess is not None and seq.request.guess > produced:
            return min(most, max(produced + 1, round(seq.request.guess)))
        ordered = self._sorted.get(seq.request.group, [])
        if len(ordered) < 8:
            return min(most, self.prior if produced < self.prior else 2 * produced)
        above = ordered[bisect_right(ordered, produced) :]
        points = [produced, *above, *([most] if not above or most > above[-1] else [])]
        place = (seq.number * GOLDEN % 1.0) * (len(points) - 1)
        low = int(place)
        value = points[low] + (place - low) * (points[min(low + 1, len(points) - 1)] - points[low])
        return min(most, max(produced + 1, round(value)))
