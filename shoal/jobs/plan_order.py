"""The order of a job: a depth-first walk of its prompts' trie, richest groups first, and the bound that it meets.

It knows sorted prompts by their lengths and neighbour overlaps; it must not know tokens, rows or files.
The trie is never built: its branching nodes are the intervals of the sorted prompts whose overlaps stay at or above
a depth, one stack pass finds them, and everything else is arithmetic on arrays.
Words: *place* is a position among the sorted prompts; *goal* the tokens of a prompt that must be computed; *reach*
the most tokens a prompt may take from others (below its goal where log-probabilities of its own tokens are wanted).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.jobs.plan_sort import Ints

Floats = npt.NDArray[np.float64]

NO_LIMIT = np.int64(1) << 40  # the reach of a prompt that may take everything


@dataclass(frozen=True, slots=True)
class Tree:
    """Branching nodes of the trie; children come before parents, the last node is the whole job at depth 0.

    Node v is where the prompts at places left[v] … right[v] are known to share exactly depth[v] tokens.
    """

    left: Ints
    right: Ints
    depth: Ints
    parent: Ints  # of the last node: itself
    leaf_parent: Ints  # by place: the deepest node that holds it

    def __len__(self) -> int:
        return len(self.depth)


def build_tree(lcp: Ints) -> Tree:
    """The tree of n >= 1 sorted prompts; lcp[i] is the overlap of places i - 1 and i, and lcp[0] is 0."""
    left, right, depth, parent = array("q", [0]), array("q", [0]), array("q", [0]), array("q", [0])
    top_after = array("q", bytes(8 * len(lcp)))  # the open node after each place
    closed = array("q")
    stack = [0]
    for place, overlap in enumerate(array("q", lcp.tobytes())):
        inner = -1
        while depth[stack[-1]] > overlap:
            inner = stack.pop()
            closed.append(inner)
            right[inner] = place - 1
            if depth[stack[-1]] >= overlap:
                parent[inner] = stack[-1]
                inner = -1
        if depth[stack[-1]] < overlap:
            node = len(depth)
            left.append(left[inner] if inner >= 0 else place - 1)
            right.append(0)
            depth.append(overlap)
            parent.append(stack[-1])
            if inner >= 0:
                parent[inner] = node
            stack.append(node)
        top_after[place] = stack[-1]
    while stack:
        node = stack.pop()
        closed.append(node)
        right[node] = len(lcp) - 1
        parent[node] = stack[-1] if stack else node
    by_closing = _ints(closed)  # nodes are renumbered by the order in which they closed: children first
    number = np.empty(len(closed), dtype=np.int64)
    number[by_closing] = np.arange(len(closed))
    top = _ints(top_after)
    holder = np.where(lcp >= np.append(lcp[1:], -1), top, np.append(top[1:], 0))
    return Tree(
        _ints(left)[by_closing],
        _ints(right)[by_closing],
        _ints(depth)[by_closing],
        number[_ints(parent)[by_closing]],
        number[holder],
    )


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64)


def walk(tree: Tree, number: Ints, lcp: Ints, goal: Ints, reach: Ints, decode: Floats) -> Ints:
    """Places in depth-first order. All arrays are by place; `number` breaks ties (file order).

    Children of a node: first a subtree that must compute the node's own tokens anyway (its smallest reach is below
    the node's depth: going first, it computes them for the others too), then by expected decode tokens per prompt
    token that the subtree adds, descending, then by the smallest number. A prompt that ends at the node adds nothing
    and so comes early. `decode` 0 everywhere leaves file order.
    """
    added = np.cumsum(goal - lcp)
    total = np.cumsum(decode)
    inner = np.arange(len(tree) - 1)  # all nodes but the whole job are somebody's child
    left, right, parent = tree.left[inner], tree.right[inner], tree.parent[inner]
    base = tree.depth[parent]
    own = np.concatenate([goal - tree.depth[tree.leaf_parent], added[right] - added[left] + goal[left] - base])
    wanted = np.concatenate([decode, total[right] - total[left] + decode[left]])
    ratio = np.divide(wanted, own, out=np.full(len(own), np.inf), where=own > 0)
    first_number = _smallest(tree, number)
    above = np.concatenate([tree.leaf_parent, parent])
    late = _late(tree, above, np.concatenate([reach, _smallest(tree, reach)[inner]]))
    rank = np.lexsort((np.concatenate([number, first_number[inner]]), -ratio, late, above))
    size = np.concatenate([np.ones(len(goal), dtype=np.int64), right - left + 1])
    start = _starts(above[rank], size[rank])
    within = np.empty(len(size), dtype=np.int64)  # where a child starts, counted from its parent's start
    within[rank] = start
    node_start = np.zeros(len(tree), dtype=np.int64)
    node_start[inner] = within[len(goal) :]
    node_start = _down(node_start, tree.parent)
    order = np.empty(len(goal), dtype=np.int64)
    order[node_start[tree.leaf_parent] + within[: len(goal)]] = np.arange(len(goal))
    return order


def _smallest(tree: Tree, value: Ints) -> Ints:
    """The smallest value among the prompts of each node."""
    smallest = np.full(len(tree), np.iinfo(np.int64).max)
    np.minimum.at(smallest, tree.leaf_parent, value)
    best = array("q", smallest.tobytes())
    for node, above in enumerate(array("q", tree.parent.tobytes())):
        if best[node] < best[above]:
            best[above] = best[node]
    return np.frombuffer(best, dtype=np.int64)


def _late(tree: Tree, above: Ints, reach: Ints) -> npt.NDArray[np.bool_]:
    """False for the one child of each node, if any, that must compute the node's tokens whoever came before."""
    late = np.ones(len(above), dtype=bool)
    forced = np.flatnonzero(reach < tree.depth[above])
    if len(forced):
        rank = forced[np.lexsort((reach[forced], above[forced]))]
        late[rank[np.flatnonzero(np.diff(above[rank], prepend=-1))]] = False
    return late


def _starts(parent: Ints, size: Ints) -> Ints:
    """Exclusive running sum of sizes within runs of equal parents."""
    before = np.cumsum(size) - size
    first = np.flatnonzero(np.diff(parent, prepend=-1))
    return before - np.repeat(before[first], np.diff(np.append(first, len(parent))))


def _down(value: Ints, parent: Ints) -> Ints:
    """Sum of values from each node up to the whole job, by pointer jumping; the whole job's own value is 0."""
    value, parent = value.copy(), parent.copy()
    last = len(parent) - 1
    while not (parent == last).all():
        value += value[parent]
        parent = parent[parent]
    return value


def computed(goal: Ints, overlap: Ints, reach: Ints) -> Ints:
    """Prompt tokens each prompt computes in a depth-first order with room for everything.

    overlap is with the prompt before it in that order. Only the first of n samples computes anything.
    """
    return goal - np.minimum(reach, overlap)
