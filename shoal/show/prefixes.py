"""The largest prefixes that prompts share, as a small tree with their texts.

It knows prompts as tokens, and a tokenizer; it must not know rows, times or how a tree is drawn.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from shoal.jobs.plan_order import Tree, build_tree
from shoal.jobs.plan_sort import Ints, Prompts, overlaps, sort_prompts

MOST = 40  # prefixes kept: more cannot be told apart in a picture
TEXT = 60  # characters shown of the two ends of a prefix's own text, together
_WIDE = 4 * TEXT  # tokens decoded of each end


class Decoder(Protocol):
    """What makes a text of tokens: a tokenizer, as far as it matters here."""

    def decode(self, ids: list[int], /, *, skip_special: bool) -> str:
        """The text."""
        ...


class Prefix(msgspec.Struct, frozen=True):
    """Tokens that several prompts begin with, after those of the prefix that it stands on."""

    begin: int  # tokens of the prefix that it stands on
    end: int  # tokens shared
    uses: int  # prompts that begin with it
    saved: int  # tokens that need not be computed because its own part is shared
    above: int  # place of the one that it stands on in the list; -1: none
    left: int  # among the sorted prompts: place of the first that begins with it
    text: str  # of its own part, shortened; empty without a tokenizer


class Forest(msgspec.Struct, frozen=True):
    """The prefixes whose sharing saves most, each after the one that it stands on, and a sum of all others."""

    prefixes: tuple[Prefix, ...] = ()
    others: int = 0  # prefixes that save less
    others_saved: int = 0  # tokens, all of them together
    prompts: int = 0

    @property
    def saved(self) -> int:
        """Tokens that need not be computed, all in all."""
        return sum(prefix.saved for prefix in self.prefixes) + self.others_saved


def largest(prompts: Prompts, reach: Ints, tokenizer: Decoder | None, most: int = MOST) -> Forest:
    """The forest of these prompts, of each of which at most `reach` tokens may be taken from others."""
    if len(prompts) < 2:
        return Forest(prompts=len(prompts))
    ranked = sort_prompts(prompts)
    lcp = np.zeros(len(ranked), dtype=np.int64)
    lcp[1:] = overlaps(prompts, ranked[:-1], ranked[1:])
    tree = build_tree(lcp)
    uses, reach = tree.right - tree.left + 1, reach[ranked]
    saved = _saved(tree, uses, reach)
    best = np.lexsort((np.arange(len(tree)), -saved))[:most]
    chosen = sorted((int(v) for v in best if saved[v] > 0), key=lambda v: (int(tree.left[v]), int(tree.depth[v])))
    place = {node: number for number, node in enumerate(chosen)}
    found: list[Prefix] = []
    for node in chosen:
        above = int(tree.parent[node])
        while above not in place and above != tree.parent[above]:
            above = int(tree.parent[above])
        on = place.get(above, -1)
        begin, end, many = found[on].end if on >= 0 else 0, int(tree.depth[node]), int(uses[node])
        start = int(prompts.offset[ranked[tree.left[node]]])
        tokens = prompts.padded[start + begin : start + end].tolist()
        text = shortened(tokens, tokenizer) if tokenizer is not None else ""
        taken = np.clip(reach[tree.left[node] : tree.right[node] + 1], begin, end) - begin
        found.append(Prefix(begin, end, many, int(taken.sum() - taken.min()), on, int(tree.left[node]), text))
    others = int((saved > 0).sum()) - len(chosen)
    rest = int(saved.sum()) - sum(prefix.saved for prefix in found)
    return Forest(tuple(found), others, rest, len(prompts))


def _saved(tree: Tree, uses: Ints, reach: Ints) -> Ints:
    """Tokens of each node's own part that its prompts take from each other: all of them but one, which computes it.

    That one is the one that may take least, and what others may not take they compute too.
    """
    own = tree.depth - tree.depth[tree.parent]
    lost, most = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree), dtype=np.int64)
    node = tree.leaf_parent
    while len(node):  # from each prompt up to the node that it may take whole
        low = reach < tree.depth[node]
        node, reach = node[low], reach[low]
        alone = np.minimum(tree.depth[node] - reach, own[node])
        np.add.at(lost, node, alone)
        np.maximum.at(most, node, alone)
        node = tree.parent[node]
    saved: Ints = (uses - 1) * own - (lost - most)
    return saved


def shortened(tokens: list[int], tokenizer: Decoder) -> str:
    """The text of tokens on one line: its beginning and its end where it is long."""
    half = TEXT // 2
    if len(tokens) <= 2 * _WIDE:
        text = tokenizer.decode(tokens, skip_special=False)
        head, tail = text, text
    else:
        head = tokenizer.decode(tokens[:_WIDE], skip_special=False)
        tail = tokenizer.decode(tokens[-_WIDE:], skip_special=False)
        text = head + tail
    text, head, tail = (" ".join(each.split()) for each in (text, head, tail))
    return text if len(text) <= TEXT else f"{head[:half].rstrip()} … {tail[-half:].lstrip()}"
