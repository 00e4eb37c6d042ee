"""A trie of blocks: the prefixes whose keys and values are in the pool, or about to be.

It knows tokens, blocks and who is to write them; it must not know requests, budgets or why anything is kept.

    root ── [t0 … t31] ── [t32 … t63] ── [t64 … t70]      one node is one block, so nodes never split
                      └── [t32 … t50, x …]                 siblings may agree in their first tokens: a reader
                                                           copies those to a block of its own (a Move)

Only full nodes have children; a shorter node is the tail of a prompt. A node is inserted when its tokens are
promised by a sequence that starts (block -1), gets its block when that sequence grows into it, and counts as
readable from the step that computes it: steps run in order, and every layer writes before it reads.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from shoal.kv.pool import BlockPool

TOKEN_BYTES = 4
NEVER = 1 << 62  # a plan index that no row has: nobody needs the block again


class Node:
    """One block of a prefix. Changed by PrefixTree and KVCache alone."""

    __slots__ = (
        "key", "block", "parent", "children", "order", "start", "writer", "planned", "before", "step",
        "last_use", "number", "uses", "next_use", "branches", "stamped_by", "queued",
    )  # fmt: skip

    def __init__(self, key: bytes, parent: Node | None, start: int, writer: int, number: int) -> None:
        self.key = key  # its tokens, 4 bytes each
        self.block = -1
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []  # keys of the children, sorted: the nearest relatives of any key are neighbours
        self.start = start  # position of its first token
        self.writer = writer  # ticket of the sequence that promised it
        self.planned = 0  # tokens of it that steps up to `step` compute
        self.before = 0  # … and that steps before `step` compute
        self.step = 0
        self.last_use = 0.0
        self.number = number  # order of birth, so that ties do not depend on memory addresses
        self.uses: tuple[int, ...] | None = None  # plan indices of rows that need it, ascending; None: nobody knows
        self.next_use = NEVER  # the first of them that had not started when the node was last looked at
        self.branches = False  # all who need it branch off inside it: it saves them less than a block
        self.stamped_by = -1  # plan index of the row that said so
        self.queued = 0  # version of its entry in the eviction queue; 0: not idle

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    def readable_before(self, step: int) -> int:
        """Tokens of the block that steps before `step` compute: what a Move of `step` may copy."""
        return self.planned if self.step < step else self.before


def common_tokens(a: bytes, b: bytes) -> int:
    """Length in tokens of the common prefix of two keys."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // TOKEN_BYTES
    low, high = 0, size // TOKEN_BYTES  # tokens [0, low) agree, [0, high] do not
    while low + 1 < high:
        middle = (low + high) // 2
        if a[: middle * TOKEN_BYTES] == b[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low


class PrefixTree:
    """Holds one share of each block it remembers."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size
        self._roots: dict[str, Node] = {}
        self.num_blocks = 0  # blocks the tree holds a share of
        self._born = 0
        self._queue: list[tuple[float, float, int, int, Node]] = []  # idle leaves, least worth first; lazy deletion
        self._version = 0

    def root(self, name: str) -> Node:
        """The node above all prefixes of `name` (an adapter, perhaps with a salt)."""
        if name not in self._roots:
            self._roots[name] = Node(b"", None, 0, -1, 0)
        return self._roots[name]

    def nearest(self, parent: Node, key: bytes) -> tuple[Node | None, int]:
        """The child of `parent` that shares most leading tokens with `key`, and how many; (None, 0) if none."""
        order = parent.order
        at = bisect_left(order, key)
        best, most = None, 0
        for i in (at, at - 1):  # in sorted order the longest common prefix is with a neighbour
            if 0 <= i < len(order):
                common = common_tokens(order[i], key)
                if common > most:
                    best, most = parent.children[order[i]], common
        return best, most

    def promise(self, parent: Node, key: bytes, writer: int) -> Node | None:
        """A new child of `parent` that `writer` will compute; None if there is one with this key already."""
        if key in parent.children:
            return None
        self._born += 1
        start = parent.start + parent.num_tokens
        child = parent.children[key] = Node(key, parent, start, writer, self._born)
        insort(parent.order, key)
        return child

    def place(self, node: Node, block: int) -> None:
        """The promised node will live in `block`, which the caller holds."""
        node.block = block
        self.pool.share(block)
        self.num_blocks += 1

    def forget(self, node: Node) -> None:
        """Take a childless node out of the tree, and its share of the block back."""
        assert node.parent is not None and not node.children
        parent = node.parent
        del parent.children[node.key]
        del parent.order[bisect_left(parent.order, node.key)]
        node.parent = None
        node.queued = 0
        if node.block >= 0:
            self.pool.drop(node.block)
            self.num_blocks -= 1

    # -- eviction: an idle leaf is a childless node whose block only the tree holds --------------------

    def is_idle(self, node: Node) -> bool:
        """Whether nobody but the tree holds the node's block, and nothing hangs below it."""
        return node.parent is not None and node.block >= 0 and not node.children and self.pool.holders[node.block] == 1

    def enqueue(self, node: Node, worth: float) -> None:
        """The node has become idle, or is worth something else than it was: only its last entry counts."""
        self._version += 1
        node.queued = self._version
        heapq.heappush(self._queue, (worth, node.last_use, node.number, node.queued, node))
        if len(self._queue) > 4 * self.pool.num_blocks + 64:
            self._queue = [entry for entry in self._queue if entry[3] == entry[4].queued]
            heapq.heapify(self._queue)

    def evict(self, count: int, exposed: Callable[[Node], None]) -> int:
        """Forget up to `count` idle leaves, least worth first. Returns how many blocks came free by that.

        `exposed` is told of each node that has become an idle leaf itself, to enqueue it.
        """
        freed = 0
        while self._queue and freed < count:
            *_, version, node = heapq.heappop(self._queue)
            if node.queued != version:
                continue
            node.queued = 0
            if not self.is_idle(node):
                continue
            parent = node.parent
            self.forget(node)
            freed += 1
            if parent is not None and self.is_idle(parent):
                exposed(parent)
        return freed

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node
