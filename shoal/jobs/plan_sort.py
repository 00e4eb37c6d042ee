"""Sorting prompts of an arena lexicographically and measuring what neighbours share, without building a trie.

It knows arrays of tokens, offsets and lengths; it must not know rows, files or why anyone sorts.
Memory is a few arrays of one number per prompt; time is linear in the tokens that prompts share, plus a sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.jobs.arena import PAD

Ints = npt.NDArray[np.int64]

_KEY = 3  # tokens packed into one 63-bit sort key
_BITS = 21  # bits of a packed token; token ids are below 2 ** 21 - 1
_CELLS = 1 << 21  # tokens compared at once: bounds the memory of a window
_FIRST_WINDOW = 16


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as slices of one padded token array. Arrays are by prompt."""

    padded: npt.NDArray[np.int32]  # tokens, then at least PAD sentinels
    offset: Ints
    length: Ints
    root: Ints  # prompts under different roots share nothing

    def __len__(self) -> int:
        return len(self.offset)


def sort_prompts(prompts: Prompts) -> Ints:
    """Prompt numbers sorted by (root, tokens, number); a prompt comes before those it is a prefix of.

    Groups of prompts equal so far are refined until each holds one prompt, or equal ones: what all members of a
    group share is skipped by comparing wide windows, then three tokens at the branch are sorted as one integer.
    """
    order = np.argsort(prompts.root, kind="stable")
    places, group = _members(prompts.root[order])  # places in `order` still to be refined, and their group
    depth = np.zeros(int(group[-1]) + 1 if len(group) else 0, dtype=np.int64)  # tokens known equal, by group
    while len(places):
        members = order[places]
        depth += _common(prompts, members, group, depth)
        key = _keys(prompts, members, depth[group])
        rank = np.lexsort((key, group))
        order[places] = members[rank]
        key = key[rank]
        unended = (key & ((1 << _BITS) - 1)) != 0  # the prompt goes on after these three tokens
        same = (group[1:] == group[:-1]) & (key[1:] == key[:-1]) & unended[1:]
        kept, label = _runs(same)
        first = np.flatnonzero(np.diff(label, prepend=-1))
        depth = depth[group[kept[first]]] + _KEY
        places, group = places[kept], label
    return order


def overlaps(prompts: Prompts, first: Ints, second: Ints) -> Ints:
    """Tokens that prompts `first[i]` and `second[i]` have in common from their start; 0 under different roots."""
    most = np.minimum(prompts.length[first], prompts.length[second])
    most[prompts.root[first] != prompts.root[second]] = 0
    common = np.zeros(len(first), dtype=np.int64)
    rows = np.flatnonzero(most)
    width = _FIRST_WINDOW
    while len(rows):
        going = np.zeros(len(rows), dtype=bool)
        step = max(1, _CELLS // width)
        for low in range(0, len(rows), step):
            some = rows[low : low + step]
            run = _equal_run(prompts, first[some], second[some], common[some], width)
            common[some] = np.minimum(common[some] + run, most[some])
            going[low : low + step] = (run == width) & (common[some] < most[some])
        rows = rows[going]
        width = min(2 * width, PAD)
    return common


def _members(label: Ints) -> tuple[Ints, Ints]:
    """Places of a sorted label array whose label occurs more than once, with groups numbered from 0."""
    return _runs(label[1:] == label[:-1]) if len(label) else (label, label)


def _runs(same: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """From "place i + 1 is in the group of place i": places in groups of two or more, and their group number."""
    joined = np.zeros(len(same) + 1, dtype=bool)
    joined[1:] |= same
    joined[:-1] |= same
    starts = np.ones(len(same) + 1, dtype=bool)
    starts[1:] = ~same
    kept = np.flatnonzero(joined)
    return kept, np.cumsum(starts[kept]) - 1


def _common(prompts: Prompts, members: Ints, group: Ints, depth: Ints) -> Ints:
    """Tokens after `depth` that all members of a group share, by group."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    shared = np.zeros(len(depth), dtype=np.int64)
    open_groups = np.ones(len(depth), dtype=bool)
    width = _FIRST_WINDOW
    while True:
        rows = np.flatnonzero(open_groups[group])
        rows = rows[rows != first[group[rows]]]  # the first of a group is what the others are compared with
        if not len(rows):
            return shared
        least = np.full(len(depth), width, dtype=np.int64)
        step = max(1, _CELLS // width)
        for low in range(0, len(rows), step):
            some = rows[low : low + step]
            owner = group[some]
            one, other, start = members[first[owner]], members[some], depth[owner] + shared[owner]
            run = _equal_run(prompts, one, other, start, width)
            room = np.minimum(prompts.length[one], prompts.length[other]) - start
            np.minimum.at(least, owner, np.minimum(run, room))
        shared[open_groups] += least[open_groups]
        open_groups &= least == width
        width = min(2 * width, PAD)


def _equal_run(prompts: Prompts, one: Ints, other: Ints, start: Ints, width: int) -> Ints:
    """How many of `width` tokens from position `start` are equal, whatever the prompts' ends."""
    windows = np.lib.stride_tricks.sliding_window_view(prompts.padded, width)
    differs = windows[prompts.offset[one] + start] != windows[prompts.offset[other] + start]
    run: Ints = np.argmax(differs, axis=1)
    run[~differs[np.arange(len(run)), run]] = width
    return run


def _keys(prompts: Prompts, members: Ints, start: Ints) -> Ints:
    """Three tokens from `start` as one integer that sorts as they do; a missing token is 0, before all others."""
    key = np.zeros(len(members), dtype=np.int64)
    left = prompts.length[members] - start
    base = prompts.offset[members] + start
    for i in range(_KEY):
        token = prompts.padded[base + i].astype(np.int64) + 1
        key = (key << _BITS) | np.where(left > i, token, 0)
    return key
