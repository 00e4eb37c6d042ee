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
    who is next on its path from the top of the tree. The tree is cut into heavy paths, of which any prompt's path
    meets the upper ends of at most log2(n); what was overwritten is never looked at again: O(n log n) in all.
    """
    top = _path_tops(tree)
    depth, above, top_of = _compact(tree.depth), _compact(tree.parent[top]), _compact(top)
    stacks: list[list[tuple[int, int]]] = [[] for _ in range(len(tree))]  # (depth, next index), the shallowest last
    depths, indexes, counts = array("q"), array("q"), array("q")
    backwards = (reversed(_compact(column)) for column in (tree.leaf_parent[served], index, reach))
    for node, own, most in zip(*backwards, strict=True):
        found: list[tuple[int, int]] = []  # deepest first
        while end := depth[node]:
            stack = stacks[top_of[node]]
            node = above[node]
            if stack:
                _read(stack, end, found)
                while stack and stack[-1][0] <= end and stack[-1][0] <= most:
                    stack.pop()
            if most > depth[node]:
                stack.append((min(most, end), own))
        counts.append(len(found))
        for step in reversed(found):
            depths.append(step[0])
            indexes.append(step[1])
    start = np.concatenate([[0], np.cumsum(_backwards(counts))])
    return Staircases(start, _backwards(depths), _backwards(indexes))


def _read(stack: list[tuple[int, int]], end: int, found: list[tuple[int, int]]) -> None:
    """Add to `found` what a path's stack says of the depths up to `end`; what is known for deeper is not repeated."""
    first = len(stack) - 1
    while first and stack[first][0] < end:
        first -= 1
    for until, following in stack[first:]:
        if not found or found[-1][1] != following:
            found.append((min(until, end), following))


def _path_tops(tree: Tree) -> Ints:
    """For each node the top of its heavy path: every node continues into its child with the most prompts."""
    nodes = np.arange(len(tree) - 1)
    size = tree.right[nodes] - tree.left[nodes]
    rank = np.lexsort((nodes, -size, tree.parent[nodes]))
    heavy = rank[np.flatnonzero(np.diff(tree.parent[rank], prepend=-1))]
    top = np.arange(len(tree))
    top[heavy] = tree.parent[heavy]
    while (top[top] != top).any():
        top = top[top]
    return top


def _compact(values: Ints) -> array[int]:
    """A typed array: quick to read one by one, without an object for each number."""
    return array("q", values.tobytes())


def _backwards(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64)[::-1].copy()
