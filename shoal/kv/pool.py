"""Which blocks are free and how many hold each of the others. It must not know what is in them."""

from __future__ import annotations

from collections import deque


class BlockPool:
    """`num_blocks` blocks, each with a count of its holders. A block is free when the count is 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.holders = [0] * num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free block, now held once. There must be one."""
        block = self._free.popleft()
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more."""
        assert self.holders[block] > 0, f"block {block} is free"
        self.holders[block] += 1

    def drop(self, block: int) -> None:
        """One holder less; the last one frees it."""
        assert self.holders[block] > 0, f"block {block} dropped twice"
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self._free.append(block)
