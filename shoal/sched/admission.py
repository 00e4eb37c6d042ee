"""Whether a waiting sequence's keys and values will find room: the answers that policies choose from.

It knows blocks, limits and expected lengths; it must not know in what order sequences are asked about, or why.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from shoal.core.sequence import Sequence
from shoal.sched.forecast import Futures
from shoal.sched.lengths import LengthEstimator, LengthHistory
from shoal.sched.policy import Reach, View

SAMPLES = 200  # lengths that are drawn for one look ahead, in up to SCENARIOS futures
SCENARIOS = 5


class Admission(Protocol):
    """Asked once at the start of a plan, then for each candidate in turn. Who fits is taken to have been let in."""

    def look(self, view: View) -> None:
        """A plan begins."""
        ...

    def fits(self, seq: Sequence, reach: Reach, view: View) -> bool:
        """Whether there is room for `seq` beside all that runs and all that was let in since the plan began."""
        ...

    def learn(self, seq: Sequence) -> None:
        """An answer has ended by itself or at its limit."""
        ...

    def forget(self, seq: Sequence) -> None:
        """A sequence has ended otherwise: nobody asks about it any more."""
        ...


def blocks_of(tokens: int, view: View) -> int:
    """Whole blocks for so many tokens."""
    return -(-tokens // view.block_size)


def would_make_room(givers: Iterable[Sequence], seq: Sequence, reach: Reach, view: View) -> bool:
    """Whether a waiting sequence's prompt had room if all of `givers`, which run, lost their memory: if not, they would
    lose it in vain."""
    given = sum(max(len(giver.blocks) - giver.private_from, 0) for giver in givers)
    free = view.num_blocks - view.used_blocks - reach.idle_blocks
    return given > 0 and blocks_of(len(seq.tokens), view) - reach.blocks <= free + given


class Watermark:
    """Aggressive: its prompt fits now, whatever will be produced (vLLM's rule), up to a share of memory."""

    def __init__(self, share: float = 0.99) -> None:
        self.share = share
        self._held = 0

    def look(self, view: View) -> None:
        """Blocks in use, and those that prompts under way have still to take."""
        self._held = view.used_blocks
        for seq in view.running:
            if len(seq.tokens) - seq.computed > 1:
                self._held += max(0, blocks_of(len(seq.tokens), view) - len(seq.blocks))

    def fits(self, seq: Sequence, reach: Reach, view: View) -> bool:
        """Whether the whole prompt has room."""
        held = self._held + blocks_of(len(seq.tokens), view) - reach.blocks + reach.idle_blocks
        if held + reach.reserved_blocks > self.share * view.num_blocks:
            return False
        self._held = held
        return True

    def learn(self, seq: Sequence) -> None:
        """Nothing."""

    def forget(self, seq: Sequence) -> None:
        """Nothing."""


class Reserved:
    """Conservative: everybody is given the memory of the longest answer it may have."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self._held = 0

    def look(self, view: View) -> None:
        """What all that run may come to hold, shared blocks once."""
        private = wanted = 0
        for seq in view.running:
            private += max(len(seq.blocks) - seq.private_from, 0)
            wanted += max(blocks_of(seq.limit, view) - seq.private_from, 0)
        self._held = max(view.used_blocks - private, 0) + wanted

    def fits(self, seq: Sequence, reach: Reach, view: View) -> bool:
        """Whether its limit has room beside the limits of the others."""
        held = self._held + blocks_of(seq.limit, view) - reach.blocks + reach.idle_blocks
        if held + reach.reserved_blocks > self.share * view.num_blocks:
            return False
        self._held = held
        return True

    def learn(self, seq: Sequence) -> None:
        """Nothing."""

    def forget(self, seq: Sequence) -> None:
        """Nothing."""


class Foreseen:
    """Past-Future (arXiv 2507.10150): in no drawn future does the peak exceed memory less a reserve.

    The fewer run, the more futures are drawn, so that a look ahead rests on about 200 lengths. A candidate stays in
    the futures once it was asked about, whether or not it fitted: the first that does not ends admission.
    """

    def __init__(self, lengths: LengthEstimator | None = None, reserve: float = 0.05, seed: int = 0) -> None:
        self.lengths, self.reserve = lengths or LengthHistory(cold=True), reserve
        self._luck = np.random.default_rng(seed)
        self._futures: Futures | None = None  # made when the first candidate asks
        self._base = 0
        self._backlog = 0  # prompt tokens that are to be computed before the next candidate's
        self.pace = 512  # … tokens of them that a step has room for

    def look(self, view: View) -> None:
        """The futures start anew."""
        self._futures = None

    def fits(self, seq: Sequence, reach: Reach, view: View) -> bool:
        """Whether the peak with it has room in every future. A sequence that was preempted is one whose prompt is
        all that it has."""
        futures = self._futures or self._draw(view)
        new = len(seq.tokens) - reach.tokens
        drawn = self.lengths.draw([seq], futures.futures, self._luck)[:, 0] - seq.produced
        self._backlog += new
        base = self._base + reach.idle_blocks
        futures.push(drawn, len(seq.tokens), reach.blocks, wait=self._backlog // self.pace)
        if futures.peak(base + reach.reserved_blocks) > view.num_blocks * (1.0 - self.reserve):
            return False
        self._base = base
        return True

    def _draw(self, view: View) -> Futures:
        running = view.running
        count = min(SCENARIOS, SAMPLES // max(len(running), 1) + 1)
        futures = self._futures = Futures(view.block_size, count, (view.block_size - 1) / 2)
        self._base, self._backlog = view.used_blocks, 0
        if not running:
            return futures
        self.lengths.look(running)
        produced = np.array([len(s.tokens) - s.num_prompt for s in running], float)
        tokens = np.array([len(s.tokens) for s in running], float)
        held = np.array([len(s.blocks) for s in running], float)
        shared = np.array([s.private_from for s in running], float)
        pending = np.array([len(s.tokens) - s.computed for s in running], float)
        behind = np.where(pending > 1, pending, 0.0)
        wait = np.where(pending > 1, behind.cumsum() // self.pace, 0.0)
        futures.extend(self.lengths.draw(running, futures.futures, self._luck) - produced, tokens, shared, wait)
        self._base = max(view.used_blocks - int(np.maximum(held - shared, 0.0).sum()), 0)
        self._backlog = int(behind.sum())
        return futures

    def learn(self, seq: Sequence) -> None:
        """Its length is history."""
        self.lengths.learn(seq)

    def forget(self, seq: Sequence) -> None:
        """Its length says nothing."""
        self.lengths.forget(seq)
