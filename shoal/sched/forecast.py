"""How many blocks a set of running sequences will need at the worst moment to come.

It knows tokens, expected ends and what is shared; it must not know where the expectations come from.
"""

from __future__ import annotations

from typing import NamedTuple

LAG = 1  # steps between a sequence's last token and the release of its blocks, when steps overlap


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
