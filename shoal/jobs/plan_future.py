"""The known future: which prefix of each prompt is needed again, and by whom, in a given serving order.

It knows the tree of sorted prompts and the order they are served in; it must not know tokens, blocks or eviction.
A prompt's future is a staircase of (depth, index): its first `depth` tokens are next needed by the prompt at `index`.
From deep to shallow both fall: a shorter prefix is needed sooner.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from shoal.jobs.plan_order import Tree
from shoal.jobs.plan_sort import Ints


@dataclass(frozen=True, slots=True)
class Staircases:
    """All staircases as flat arrays: those of the prompt served p-th are start[p] … start[p + 1] - 1, deepest first."""

    start: Ints
    depth: Ints
    index: Ints


def neighbour_staircases(overlap: Ints, index: Ints) -> Staircases:
    """For a depth-first order without reach limits: only the next prompt matters.

    overlap[p] is with the prompt before, index[p] the serving index, both by serving position.
    """
    after = np.append(overlap[1:], 0)
    has = after > 0
    start = np.concatenate([[0], np.cumsum(has)])
    return Staircases(start, after[has], np.append(index[1:], 0)[has])


def staircases(tree: Tree, served: Ints, index: Ints, reach: Ints) -> Staircases:
    """For any serving order: served[p] is the place served p-th, index[p] its serving index, reach[p] its reach.

    A place may be served more than once. One pass from the last to the first: every prompt reads, then overwrites,
    the stamps on its path to the top. Time is the sum of the paths' branching nodes.
    """
    depth, parent = array("q", tree.depth.tobytes()), array("q", tree.parent.tobytes())
    stamp = array("q", [-1]) * len(tree)  # next prompt that needs the whole node
    partial: dict[int, list[tuple[int, int]]] = {}  # nodes with a part above the node that is needed sooner
    depths, indexes, counts = array("q"), array("q"), array("q")
    holders = tree.leaf_parent[served]
    for p in range(len(served) - 1, -1, -1):
        node, most, own = int(holders[p]), int(reach[p]), int(index[p])
        found: list[tuple[int, int]] = []
        while depth[node]:
            steps = partial.get(node, [])
            for step in ((depth[node], stamp[node]), *steps):
                if step[1] >= 0 and (not found or step[1] < found[-1][1]):
                    found.append(step)
            if most >= depth[node]:
                stamp[node] = own
                if steps:
                    del partial[node]
            elif most > depth[parent[node]]:
                partial[node] = [*(step for step in steps if step[0] > most), (most, own)]
            node = parent[node]
        counts.append(len(found))
        for step in reversed(found):
            depths.append(step[0])
            indexes.append(step[1])
    number = np.frombuffer(counts, dtype=np.int64)[::-1]
    start = np.concatenate([[0], np.cumsum(number)])
    return Staircases(start, _backwards(depths), _backwards(indexes))


def _backwards(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64)[::-1].copy()
