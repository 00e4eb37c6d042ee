"""Blocks for sequences: the only file that gives blocks to a sequence or takes them back.

It knows prefixes, who computes them and which plan index needs them next; it must not know budgets or preferences
(what an idle block is worth is asked from a function).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from shoal.core.sequence import Sequence
from shoal.core.types import PENDING, Move
from shoal.kv.pool import BlockPool
from shoal.kv.tree import NEVER, Node, PrefixTree


@dataclass(frozen=True, slots=True)
class Match:
    """What a sequence can reuse: whole blocks, then the first `copied` tokens of `source`."""

    path: tuple[Node, ...]
    source: Node | None
    copied: int
    tokens: int  # all that need not be computed
    whole: bool  # its prompt is there to the last token, which is computed again for its hidden state


class KVCache:
    """Invariant: every block is free, or held by the sequences whose `blocks` list it and by at most one node."""

    def __init__(self, num_blocks: int, block_size: int, worth: Callable[[Node], float], reuse: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size)
        self.block_size = block_size
        self.reuse = reuse  # False computes every prompt by itself: the control that sharing is measured against
        self.in_use = 0  # blocks that sequences hold; the rest is free, or idle in the tree
        self._users = [0] * num_blocks  # sequences that hold the block
        self._worth = worth
        self._horizon = 0  # lowest plan index that had not started when somebody last said
        self._expiring: list[tuple[int, int, Node]] = []  # idle nodes by next use and version; lazy deletion
        self._nodes: dict[Sequence, list[Node]] = {}  # node i spells block i of the sequence, as far as nodes go
        self._copies: dict[Sequence, tuple[Node, int]] = {}  # sources held until the Move is planned

    # -- starting ----------------------------------------------------------------------------------

    def match(self, seq: Sequence, step: int) -> Match | None:
        """The longest prefix that `seq` need not compute in `step`. None: a running sequence is about to compute
        more of it, so wait. Positions whose hidden state is wanted are never reused."""
        size, limit, needed = self.block_size, self._reusable(seq), self._needed(seq)
        node, path, at = self.tree.root(seq.request.root), [], 0
        if not self.reuse:
            return Match((), None, 0, 0, False)
        while at + size <= limit:
            child = node.children.get(seq.tokens[at : at + size].tobytes())
            if child is None:
                break
            if child.planned < size:
                return None
            path.append(child)
            node, at = child, at + size
        rest = seq.tokens[at : min(at + size, needed)].tobytes()
        source, common = self.tree.nearest(node, rest)
        copied = min(common, limit - at)
        whole = seq.scored < 0 and at + common >= needed
        if source is None or copied <= 0:
            return Match(tuple(path), None, 0, at, whole)
        if source.readable_before(step) < copied:
            return None
        return Match(tuple(path), source, copied, at + copied, whole)

    @staticmethod
    def _needed(seq: Sequence) -> int:
        """Tokens whose keys and values it needs, as far as they are known."""
        return len(seq.tokens) if seq.samples else seq.goal

    def _reusable(self, seq: Sequence) -> int:
        """Of them, those it may take from others: the last is always computed, for its hidden state."""
        if seq.scored >= 0:
            return seq.scored - seq.scored % self.block_size  # a block computed again in part is computed in place
        return self._needed(seq) - 1

    def acquire(self, seq: Sequence, match: Match, now: float) -> None:
        """Start `seq` from `match`, and promise the rest of its known tokens to others."""
        assert not seq.blocks
        nodes = list(match.path)
        for node in nodes:
            self.pool.share(node.block)
            self._use(seq, node.block)
            node.last_use = now
        if match.source is not None:
            self.pool.share(match.source.block)
            self._copies[seq] = match.source, match.copied
            match.source.last_use = now
        seq.computed = match.tokens
        self._nodes[seq] = nodes
        if self.reuse:
            self._promise(seq, nodes)
        for node in nodes:
            self._stamp(node, seq)
        future = seq.request.future
        shared = -(-future[0][0] // self.block_size) if future else 0
        seq.private_from = max(len(match.path), shared)

    def _promise(self, seq: Sequence, nodes: list[Node]) -> None:
        size, end = self.block_size, self._needed(seq)
        parent = nodes[-1] if nodes else self.tree.root(seq.request.root)
        for start in range(len(nodes) * size, end, size):
            key = seq.tokens[start : min(start + size, end)].tobytes()
            node = self.tree.promise(parent, key, seq.number)
            if node is None:  # there already: we compute it again, whole or its last token, and go on below it
                node = parent.children[key]
                if node.planned < node.num_tokens:
                    return
            nodes.append(node)
            parent = node

    def _stamp(self, node: Node, seq: Sequence) -> None:
        """Write into the node when it is next needed, as far as the row's plan knows."""
        index, future = seq.request.index, seq.request.future
        if future is None or index < node.stamped_by:
            return
        node.uses = tuple(sorted(later for depth, later in future if depth > node.start))
        node.branches = bool(future) and future[0][0] < node.start + self.block_size
        node.stamped_by = index

    # -- running -----------------------------------------------------------------------------------

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for `num_tokens` more after `seq.computed`. All of it or nothing; may evict idle blocks."""
        short = -(-(seq.computed + num_tokens) // self.block_size) - len(seq.blocks)
        if short <= 0:
            return True
        nodes, begin = self._nodes[seq], len(seq.blocks)
        again = {i: nodes[i] for i in range(begin, min(begin + short, len(nodes))) if self._lies_idle(nodes[i])}
        for node in again.values():
            self.pool.share(node.block)
        fresh = short - len(again)
        lack = fresh - self.pool.num_free
        if lack > 0 and self.tree.evict(lack, self._expose) < lack and fresh > self.pool.num_free:
            for node in reversed(again.values()):
                self.pool.drop(node.block)
                self._expose(node)
            return False
        for i in range(begin, begin + short):
            block = again[i].block if i in again else self.pool.take()
            self._use(seq, block)
            if i < len(nodes) and nodes[i].block < 0:
                self.tree.place(nodes[i], block)
        return True

    def _lies_idle(self, node: Node) -> bool:
        """Whether a sequence that computes the node again may do so in its own block: nobody else holds it. (What it
        writes is what stands there; a block beside it would need room that the node itself keeps from being free.)"""
        return node.parent is not None and node.block >= 0 and self.pool.holders[node.block] == 1

    def _use(self, seq: Sequence, block: int) -> None:
        seq.blocks.append(block)
        self.in_use += self._users[block] == 0
        self._users[block] += 1

    def reserved(self, index: int) -> set[int]:
        """Idle blocks that rows up to plan index `index` need: in planned order, the open branches of the walk."""
        found: set[int] = set()
        for use, version, leaf in self._expiring:
            node: Node | None = leaf
            if use <= index and leaf.queued == version:
                while node is not None and node.block >= 0 and self._users[node.block] == 0 and node.block not in found:
                    found.add(node.block)
                    node = node.parent
        return found

    def loss(self, num_blocks: int, kept: set[int]) -> int:
        """The soonest plan index that would miss a whole block if `num_blocks` idle blocks beside `kept` were
        forgotten, those needed last first; NEVER if nobody is known to miss any."""
        uses: dict[int, int] = {}
        for _, version, leaf in self._expiring:
            node: Node | None = leaf if leaf.queued == version else None
            while node is not None and node.block >= 0 and self._users[node.block] == 0 and node.block not in uses:
                known = NEVER if node.branches else leaf.next_use
                uses[node.block] = min((use for use in node.uses or () if use >= known), default=NEVER)
                node = node.parent
        last_first = sorted((use for block, use in uses.items() if block not in kept), reverse=True)
        lost = last_first[:num_blocks]
        return min(lost, default=NEVER)

    def count_idle(self, nodes: Iterable[Node]) -> list[int]:
        """Of each node, the blocks of it and of all above it that no sequence holds and that no node before has."""
        found: set[int] = set()
        counts = []
        for leaf in nodes:
            before = len(found)
            node: Node | None = leaf
            while node is not None and node.block >= 0 and self._users[node.block] == 0 and node.block not in found:
                found.add(node.block)
                node = node.parent
            counts.append(len(found) - before)
        return counts

    def revalue(self, node: Node) -> None:
        """Ask again what an idle block is worth; nothing if it is not one by now."""
        if node.queued and self.tree.is_idle(node):
            self._queue(node)

    def idle(self, match: Match) -> set[int]:
        """Blocks of the match that no sequence holds now and that it would take back into use."""
        nodes = match.path if match.source is None else (*match.path, match.source)
        return {node.block for node in nodes if self._users[node.block] == 0}

    def copy(self, seq: Sequence, horizon: int) -> Move | None:
        """The Move that a sequence which has just started and grown needs, once."""
        held = self._copies.pop(seq, None)
        if held is None:
            return None
        source, tokens = held
        move = Move(source.block, seq.blocks[(seq.computed - 1) // self.block_size], tokens)
        self.pool.drop(source.block)
        self._settle(source, horizon)
        return move

    def planned(self, seq: Sequence, start: int, count: int, step: int) -> None:
        """Step `step` computes `count` tokens of `seq` from `start` on: others may read them."""
        nodes, size = self._nodes[seq], self.block_size
        for i in range(start // size, min(len(nodes), (start + count - 1) // size + 1)):
            node = nodes[i]
            done = min(start + count - node.start, node.num_tokens)
            if node.writer == seq.number and done > node.planned:
                if node.step < step:
                    node.before, node.step = node.planned, step
                node.planned = done

    # -- ending ------------------------------------------------------------------------------------

    def release(self, seq: Sequence, horizon: int, step: int, again: bool) -> None:
        """Take every block back. The only way a sequence loses a block.

        Nodes it promised and did not compute are forgotten. Blocks that no row from plan index `horizon` on needs
        become free at once; the others stay for reuse until memory is short. `again`: the sequence was preempted
        and will want its blocks back.
        """
        held = self._copies.pop(seq, None)
        if held is not None:
            self.pool.drop(held[0].block)
            self._settle(held[0], horizon)
        nodes = self._nodes.pop(seq, [])
        while nodes and nodes[-1].writer == seq.number and nodes[-1].planned < nodes[-1].num_tokens:
            self.tree.forget(nodes.pop())
        if self.reuse and (again or seq.request.future is None):
            self._seal(seq, nodes, step)
        if again and seq.request.index >= 0:
            for node in nodes:
                node.uses = tuple(sorted({seq.request.index, *(node.uses or ())}))
        for block in reversed(seq.blocks):
            self.pool.drop(block)
            self._users[block] -= 1
            self.in_use -= self._users[block] == 0
        seq.blocks.clear()
        seq.table = ()
        seq.computed = 0
        for node in reversed(nodes):
            self._settle(node, horizon)

    def expire(self, horizon: int) -> None:
        """Free idle blocks whose last user has started without them: it found the same tokens elsewhere."""
        self._horizon = horizon
        heap = self._expiring
        while heap and heap[0][0] < horizon:
            _, version, node = heapq.heappop(heap)
            if node.queued == version:
                self._settle(node, horizon)

    def _expose(self, node: Node) -> None:
        self._settle(node, self._horizon)

    def _settle(self, node: Node | None, horizon: int) -> None:
        """Queue a node that has become idle for eviction, or free it at once if nobody will need it."""
        while node is not None and self.tree.is_idle(node):
            node.next_use = next((use for use in node.uses or () if use >= horizon), NEVER)
            if node.uses is None or node.next_use < NEVER:
                self._queue(node)
                return
            parent = node.parent
            self.tree.forget(node)
            node = parent

    def _queue(self, node: Node) -> None:
        self.tree.enqueue(node, self._worth(node))
        if node.next_use < NEVER:
            heapq.heappush(self._expiring, (node.next_use, node.queued, node))

    def _seal(self, seq: Sequence, nodes: list[Node], step: int) -> None:
        """Let the blocks that outputs have filled be found again: after preemption, or by a next turn."""
        size = self.block_size
        known = len(seq.tokens) - (seq.tokens[-1] == PENDING)
        for i in range(seq.num_prompt // size, min(seq.computed, known) // size):
            if i < len(nodes) and nodes[i].num_tokens == size:
                continue
            if i < len(nodes):  # the prompt's tail: the full block says more
                tail = nodes[i]
                if tail.writer != seq.number or tail.block != seq.blocks[i]:
                    return
                self.tree.forget(nodes.pop())
            if i != len(nodes) or (nodes and nodes[-1].parent is None):
                return  # the node above is somebody else's and has been forgotten
            parent = nodes[-1] if nodes else self.tree.root(seq.request.root)
            key = seq.tokens[i * size : (i + 1) * size].tobytes()
            node = self.tree.promise(parent, key, seq.number)
            if node is None:
                node = parent.children[key]
                if node.planned < size:
                    return
            else:
                self.tree.place(node, seq.blocks[i])
                node.planned = node.before = size
                node.step = step
                node.last_use = parent.last_use
                node.uses = None if seq.request.future is None else ()
            nodes.append(node)

    def audit(self, live: Collection[Sequence]) -> None:
        """Every share has a holder and every holder a share. Cheap enough for tests and for idle time."""
        count = [0] * self.pool.num_blocks
        for seq in live:
            for block in seq.blocks:
                count[block] += 1
        for source, _ in self._copies.values():
            count[source.block] += 1
        for node in self.tree.nodes():
            if node.block >= 0:
                count[node.block] += 1
        wrong = [b for b, n in enumerate(count) if n != self.pool.holders[b]]
        used = {block for seq in live for block in seq.blocks}
        if wrong or self.pool.num_free != count.count(0) or self.in_use != len(used):
            raise AssertionError(f"blocks {wrong[:8]} have lost or invented holders")
