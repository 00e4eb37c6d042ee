"""What sharing is lost when prefixes may be shared at one level only: BatchLLM's first-level prefix enlargement.

It knows the tree of sorted prompts; it must not know tokens, plans or engines. Shoal shares at every level, so this
is analysis: the paper's rule, the best any one-level grouping can do, and what either leaves on the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shoal.jobs.plan_order import Tree


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that share their first `depth` tokens once; nothing deeper is shared. Depth 0 shares nothing."""

    depth: int
    places: tuple[int, ...]


@dataclass(slots=True)
class _Branch:
    """A node of the tree while the paper's rule changes it."""

    tokens: int  # of its own, below its parent
    leaves: int
    children: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # places of prompts that branch off here


def saved_by(groups: list[Group]) -> int:
    """Prompt tokens that a grouping saves."""
    return sum(group.depth * (len(group.places) - 1) for group in groups)


def paper_groups(tree: Tree) -> list[Group]:
    """Groups by the paper's rule, from the leaves up: a child of a node is lifted beside the node, with the node's
    tokens in front, when that shares more of its own than it computes again of the node's."""
    branches = [_Branch(d, n) for d, n in zip(_own(tree).tolist(), (tree.right - tree.left + 1).tolist(), strict=True)]
    parent = tree.parent.tolist()
    for node, above in enumerate(parent[:-1]):
        branches[above].children.append(node)
    for place, node in enumerate(tree.leaf_parent.tolist()):
        branches[node].ends.append(place)
    top = branches[-1]
    for node in range(len(branches) - 1):  # children come before parents
        _lift(branches, node, branches[parent[node]])
    groups = [Group(0, (place,)) for place in top.ends]
    for child in top.children:
        groups.append(Group(branches[child].tokens, tuple(_places(branches, child))))
    return groups


def _lift(branches: list[_Branch], number: int, above: _Branch) -> None:
    """Lift what gains from it out of one node to the node above; a node left with one child becomes that child."""
    node = branches[number]
    for child in list(node.children):
        branch = branches[child]
        if (branch.leaves - 1) * branch.tokens > node.tokens:
            node.children.remove(child)
            node.leaves -= branch.leaves
            branch.tokens += node.tokens
            above.children.append(child)
    if len(node.children) == 1 and not node.ends:
        only = branches[node.children[0]]
        only.tokens += node.tokens
        branches[number] = only
    elif not node.children and len(node.ends) <= 1:
        above.children.remove(number)
        above.ends += node.ends


def _places(branches: list[_Branch], number: int) -> list[int]:
    found: list[int] = []
    rest = [number]
    while rest:
        node = branches[rest.pop()]
        found += node.ends
        rest += node.children
    return found


def exact_groups(tree: Tree) -> list[Group]:
    """The one-level grouping that saves most: facility location on the tree, solved from the leaves up.

    Opening a group at a node costs its depth; every prompt saves the depth of its deepest open ancestor.
    best[v][k] is what the prompts under v save when their deepest open ancestor above v is the k-th on v's path.
    """
    depth, parent = tree.depth, tree.parent.tolist()
    paths = _paths(tree)
    kept = [np.zeros(len(path), dtype=np.int64) for path in paths]  # v stays closed (last entry: v is open)
    number = np.bincount(tree.leaf_parent, minlength=len(tree))
    for v in range(len(tree)):
        kept[v] += number[v] * depth[paths[v]]
        if v != parent[v]:
            kept[parent[v]] += np.maximum(kept[v][:-1], kept[v][-1] - depth[v])
    opened = np.zeros(len(tree), dtype=np.int64)  # the deepest open node at or above each, as a place on its path
    for v in range(len(tree) - 2, -1, -1):
        above = opened[parent[v]]
        last = len(paths[v]) - 1
        opened[v] = last if kept[v][last] - depth[v] > kept[v][above] else above
    members: dict[int, list[int]] = {}
    for place, node in enumerate(tree.leaf_parent.tolist()):
        members.setdefault(int(paths[node][opened[node]]), []).append(place)
    alone = members.pop(len(tree) - 1, [])
    return [Group(0, (place,)) for place in alone] + [Group(int(depth[v]), tuple(p)) for v, p in members.items()]


def _paths(tree: Tree) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Nodes from the whole job down to each node, itself last."""
    paths = [np.zeros(0, dtype=np.int64)] * len(tree)
    for v in range(len(tree) - 1, -1, -1):
        above = paths[tree.parent[v]]
        paths[v] = np.append(above, v)
    return paths


def _own(tree: Tree) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return tree.depth - tree.depth[tree.parent]
