"""How many blocks a set of running sequences will need at the worst moment to come.

It knows tokens, expected ends and what is shared; it must not know where the expectations come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LAG = 1  # steps between a sequence's last token and the release of its blocks, when steps overlap

Floats = NDArray[np.float64]


class Growth(NamedTuple):
    """One sequence: tokens known now, steps until it ends, leading blocks that its end will not free."""

    remaining: int
    tokens: int
    shared_blocks: int


class MemoryForecast:
    """Peak over the future steps (Past-Future, arXiv 2507.10150), in blocks, shared prefixes counted once.

    With the sequences ordered by remaining steps, longest first, the memory just before the i-th ends is
    base + sum over the first i of (tokens + remaining_i) - shared: those that end earlier are gone, the others have
    all grown by remaining_i (and by a step more, for the end of a step is learnt late). The maximum over i is the
    peak. Prompts count whole from the start (conservative while they are prefilled), shared blocks as never freed,
    and each sequence is rounded up to whole blocks.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def peak(self, base: int, growths: list[Growth]) -> float:
        """Blocks at the worst moment; `base` counts the blocks that stay whatever ends."""
        growths = sorted(growths, key=lambda g: -g.remaining)
        size, worst, tokens, shared = self.block_size, float(base), 0, 0
        for alive, growth in enumerate(growths, 1):
            tokens += growth.tokens
            shared += growth.shared_blocks
            blocks = (tokens + alive * (growth.remaining + LAG + size - 1)) / size - shared
            worst = max(worst, base + blocks)
        return worst


class Futures:
    """The same peak in several possible futures at once, for sequences that do not all gain a token in every step.

    A sequence holds its tokens, and from step `wait` on (when its prompt is computed) gains `pace` tokens a step
    until `remaining` have come; a drafting one has `slots` of room beside. A prefix that several share is counted
    once, as long as any of them lives. Memory only falls when something ends, so it is enough to look at the ends:

        memory(x) = base + sum of (tokens + slots - shared + pace * max(0, x - wait)) over those alive at x
                         + each prefix with somebody alive at x

    which is done for all ends together by sums over those that end later, less those that have not begun. With no
    waiting, one token a step and no prefixes this is MemoryForecast. `waste` is what each sequence leaves empty of its
    last block: all of it but a token is an upper bound, half of it what many leave on average.
    """

    def __init__(self, block_size: int, futures: int = 1, waste: float | None = None) -> None:
        self.block_size, self.futures = block_size, futures
        self.waste = block_size - 1 if waste is None else waste
        self._count = 0
        self._fixed = np.empty((5, 16))  # blocks held, pace [blocks a step], wait, number of prefix or -1, its blocks
        self._ends = np.empty((futures, 16))  # steps until each ends

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        """Forget all."""
        self._count = 0

    def extend(
        self, remaining: Floats, tokens: Floats, shared_blocks: Floats, wait: Floats | float = 0.0,
        pace: Floats | float = 1.0, slots: Floats | float = 0.0,
    ) -> None:  # fmt: skip
        """Many at once: `remaining` [futures, count], the others [count] or one number for all."""
        count, size = remaining.shape[1], self.block_size
        self._reserve(self._count + count)
        new = slice(self._count, self._count + count)
        self._fixed[0, new] = (tokens + slots + LAG + self.waste) / size - shared_blocks
        self._fixed[1, new] = np.asarray(pace) / size
        self._fixed[2, new] = wait
        self._fixed[3, new], self._fixed[4, new] = -1.0, 0.0
        self._ends[:, new] = wait + np.ceil(remaining / pace)
        self._count += count

    def push(
        self, remaining: Floats | float, tokens: int, shared_blocks: int = 0, wait: float = 0.0, pace: float = 1.0,
        slots: int = 0, prefix: int = -1, prefix_blocks: int = 0,
    ) -> None:  # fmt: skip
        """One more; of it `prefix_blocks` belong to the prefix of that number, and are not among the shared ones."""
        each = np.broadcast_to(np.asarray(remaining, float), (self.futures,))[:, None]
        self.extend(
            each, np.array([float(tokens)]), np.array([float(shared_blocks + prefix_blocks)]), wait, pace, slots
        )
        self._fixed[3:, self._count - 1] = prefix, prefix_blocks

    def pop(self) -> None:
        """Take the last one back."""
        self._count -= 1

    def _reserve(self, count: int) -> None:
        if count > self._fixed.shape[1]:
            room = max(count, 2 * self._fixed.shape[1])
            fixed, ends = np.empty((5, room)), np.empty((self.futures, room))
            fixed[:, : self._count], ends[:, : self._count] = (
                self._fixed[:, : self._count],
                self._ends[:, : self._count],
            )
            self._fixed, self._ends = fixed, ends

    def peak(self, base: float) -> float:
        """Blocks at the worst moment of the worst future; `base` counts the blocks that stay whatever ends."""
        if not self._count:
            return float(base)
        held, pace, wait, prefix, of_prefix = self._fixed[:, : self._count]
        ends = self._ends[:, : self._count]
        for number in np.unique(prefix[prefix >= 0]):  # a prefix is one that neither grows nor ends before its users
            users = prefix == number
            last = self._ends[:, : self._count][:, users].max(1, keepdims=True)
            ends = np.hstack([ends, last])
            held, pace, wait = np.append(held, of_prefix[users].max()), np.append(pace, 0.0), np.append(wait, 0.0)
        order = np.argsort(-ends, axis=1, kind="stable")
        at = np.take_along_axis(ends, order, 1)
        begun = (pace * wait)[order].cumsum(1)
        memory = held[order].cumsum(1) + at * pace[order].cumsum(1) - begun
        if wait.any():
            memory -= self._not_begun(at, pace, wait)
        return float(base) + max(0.0, float(memory.max()))

    @staticmethod
    def _not_begun(at: Floats, pace: Floats, wait: Floats) -> Floats:
        """What the sum above counts of those that gain nothing yet, a negative growth."""
        by_wait = np.argsort(wait, kind="stable")
        wait, pace = wait[by_wait], pace[by_wait]
        paces = np.append(pace[::-1].cumsum()[::-1], 0.0)
        begins = np.append((pace * wait)[::-1].cumsum()[::-1], 0.0)
        later = np.searchsorted(wait, at, "left")
        none: Floats = at * paces[later] - begins[later]
        return none
