"""Upper bounds of answers' lengths from what their prompts look like: a forest of regression trees that keep lengths.

It knows prompts' tokens, limits and finished lengths; it must not know the length of anything that still runs, nor
what a token means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shoal.core.sequence import Sequence
from shoal.core.types import Request
from shoal.sched.lengths import FEW, LengthEstimator, Lengths, known, within

BUCKETS = 48  # places that token ids are hashed to: how often each occurs in the prompt's head
HEAD = 64  # tokens of a prompt that are looked at beside its length: a task says at first what it wants
CUTS = 0.1, 0.25, 0.4, 0.55, 0.7, 0.85  # places of a cut between a feature's least and greatest value
GROWN = 4  # trees from which a forest is believed for good
SPREAD = 2654435761  # multiplied by it, neighbouring ids fall into different places

Features = NDArray[np.float32]


def features(request: Request) -> Features:
    """Length, limit and group of a request, and what tokens its prompt begins with."""
    head = np.array(request.prompt[:HEAD], np.int64)
    counts = np.bincount(((head * SPREAD) >> 12) % BUCKETS, minlength=BUCKETS)
    group = crc32(request.group.encode()) % 1024  # as a number: a tree may cut it more than once
    of_all = [np.log1p(len(request.prompt)), np.log1p(request.sampling.max_tokens), group]
    return np.concatenate([of_all, counts]).astype(np.float32)


@dataclass(slots=True)
class Tree:
    """Cuts of one tree: node i asks whether feature[i] <= at[i], and goes to left[i] or to left[i] + 1; a leaf has
    feature -1 and the sorted lengths that fell into it."""

    feature: list[int]
    at: list[float]
    left: list[int]
    lengths: list[Lengths]

    def leaf(self, row: Features) -> Lengths:
        """The lengths of those that look like `row`."""
        node = 0
        while self.feature[node] >= 0:
            node = self.left[node] + int(row[self.feature[node]] > self.at[node])
        return self.lengths[node]


def grow(rows: Features, lengths: Lengths, luck: np.random.Generator, least: int, tries: int) -> Tree:
    """A tree that cuts where the lengths' variance falls most, among `tries` features drawn at each node, each at one
    of a few places; no leaf has fewer than `least`."""
    tree = Tree([-1], [0.0], [-1], [lengths])
    open_nodes = [(0, np.arange(len(lengths)))]
    while open_nodes:
        node, members = open_nodes.pop()
        tree.lengths[node] = np.sort(lengths[members])
        cut = _best_cut(rows[members], lengths[members], luck, least, tries) if len(members) >= 2 * least else None
        if cut is None:
            continue
        tree.feature[node], tree.at[node] = cut
        tree.left[node] = len(tree.feature)
        right = rows[members, cut[0]] > cut[1]
        for part in (members[~right], members[right]):
            open_nodes.append((len(tree.feature), part))
            tree.feature.append(-1)
            tree.at.append(0.0)
            tree.left.append(-1)
            tree.lengths.append(lengths)
    return tree


def _best_cut(
    rows: Features, lengths: Lengths, luck: np.random.Generator, least: int, tries: int
) -> tuple[int, float] | None:
    """(feature, value) that parts the lengths best, all tried features at once."""
    count, total = len(lengths), float(lengths.sum())
    tried = luck.choice(rows.shape[1], min(tries, rows.shape[1]), replace=False)
    columns = rows[:, tried]
    low, high = columns.min(0), columns.max(0)
    best, found = total * total / count + 1e-9 * float(lengths.var()) * count, None
    for share in CUTS:
        at = low + share * (high - low)
        left = columns <= at
        below = left.sum(0)
        part = lengths @ left
        fits = (below >= least) & (count - below >= least)
        value = np.where(fits, part**2 / np.maximum(below, 1) + (total - part) ** 2 / np.maximum(count - below, 1), 0.0)
        top = int(value.argmax())
        if value[top] > best:
            best, found = float(value[top]), (int(tried[top]), float(at[top]))
    return found


class QuantileForest(LengthEstimator):
    """Quantiles over the lengths in the leaves that a request falls into, of those longer than what it has produced:
    a bound tightens while an answer goes on, and is above it always.

    JITServe (arXiv 2504.20068) asks it for the 0.95 quantile. A tree is grown with every `every` answers, the oldest
    makes room, so that no plan waits for all to be grown and old answers are forgotten. The level is corrected as it
    is used: when more than a share 1 - q of the bounds first given for q were exceeded, higher ones are given, as
    adaptive conformal prediction does.
    """

    def __init__(
        self, trees: int = 24, window: int = 1000, every: int = 16, least: int = 12, pace: float = 0.01, seed: int = 0
    ) -> None:
        self.trees, self.every, self.least, self.pace = trees, every, least, pace
        self._luck = np.random.default_rng(seed)
        self._rows: deque[Features] = deque(maxlen=window)
        self._lengths: deque[float] = deque(maxlen=window)
        self._forest: deque[Tree] = deque(maxlen=trees)
        self._ended = 0
        self._like: dict[int, tuple[Features, Lengths, int]] = {}  # by number: its leaves' lengths, sorted, of how many
        self._first: dict[int, tuple[float, int]] = {}  # by number: the share first asked for, and the bound given
        self._level: dict[float, float] = {}  # by share asked: the share that is looked up

    def quantile(self, seq: Sequence, share: float) -> int:
        """The bound; the limit before enough answers have ended."""
        given = known(seq)
        if given is not None:
            return given
        like = self._alike(seq)
        if len(like) < FEW:
            return seq.request.sampling.max_tokens
        past = int(np.searchsorted(like, seq.produced, "right"))
        above = like[past:]
        if not len(above):
            return seq.request.sampling.max_tokens
        level = self._level.get(share, share)
        bound = within(seq, float(above[min(len(above) - 1, int(level * len(above)))]))
        if not seq.produced:
            self._first.setdefault(seq.number, (share, bound))
        return bound

    def draw(self, seqs: Seq[Sequence], count: int, luck: np.random.Generator) -> Lengths:
        """Lengths out of the leaves of each."""
        found = np.empty((count, len(seqs)))
        for i, seq in enumerate(seqs):
            like = self._alike(seq)
            above = like[int(np.searchsorted(like, seq.produced, "right")) :]
            sure, most = known(seq), seq.request.sampling.max_tokens
            if sure is not None or len(above) < 1:
                found[:, i] = most if sure is None else sure
            else:
                found[:, i] = np.minimum(most, above[luck.integers(0, len(above), count)])
        return found

    def _alike(self, seq: Sequence) -> Lengths:
        """The lengths of its leaves, looked up once, and again when few trees have become enough: those
        grew from the first answers to end, which are the shortest."""
        found = self._like.get(seq.number)
        if found is None or found[2] < min(GROWN, self.trees) <= len(self._forest):
            row = features(seq.request) if found is None else found[0]
            leaves = [tree.leaf(row) for tree in self._forest]
            lengths = np.sort(np.concatenate(leaves)) if leaves else np.empty(0)
            found = self._like[seq.number] = row, lengths, len(leaves)
        return found[1]

    def forget(self, seq: Sequence) -> None:
        """Nobody asks about it any more."""
        self._like.pop(seq.number, None)
        self._first.pop(seq.number, None)

    def learn(self, seq: Sequence) -> None:
        """One more; perhaps a tree, and a word on the bound it was given."""
        row = self._like.pop(seq.number, (None,))[0]
        share, bound = self._first.pop(seq.number, (0.0, 0))
        if bound:
            miss = float(seq.produced > bound)
            level = self._level.get(share, share) + self.pace * (miss - (1.0 - share))
            self._level[share] = min(max(level, share - 0.1), 1.0)
        self._rows.append(features(seq.request) if row is None else row)
        self._lengths.append(float(seq.produced))
        self._ended += 1
        if self._ended % self.every == 0:
            rows, lengths = np.array(self._rows), np.array(self._lengths)
            some = self._luck.integers(0, len(lengths), len(lengths))
            tries = max(4, 2 * rows.shape[1] // 3)
            self._forest.append(grow(rows[some], lengths[some], self._luck, self.least, tries))
