"""Sorting prompts and looking ahead: as the definitions say, and no slower than their tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_jobs import Asked, common

from shoal.jobs.arena import PAD
from shoal.jobs.plan_future import staircases
from shoal.jobs.plan_order import NO_LIMIT, build_tree
from shoal.jobs.plan_sort import Prompts, overlaps, sort_prompts


def prompts_of(sequences: Sequence[Sequence[int]], roots: Sequence[int]) -> Prompts:
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    flat = [token for sequence in sequences for token in sequence]
    padded = np.array(flat + [-1] * PAD, dtype=np.int32)
    return Prompts(padded, np.cumsum(lengths) - lengths, lengths, np.array(roots, dtype=np.int64))


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.sampled_from([0, 1, 2, 2**21 - 3]), max_size=40)), max_size=20
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SEQUENCES)
def test_sorting_is_lexicographic_by_root_and_stable(pairs: list[tuple[int, list[int]]]) -> None:
    prompts = prompts_of([tokens for _, tokens in pairs], [root for root, _ in pairs])
    order = sort_prompts(prompts)
    assert order.tolist() == sorted(range(len(pairs)), key=lambda i: (pairs[i][0], pairs[i][1], i))
    for i, j, overlap in zip(order, order[1:], overlaps(prompts, order[:-1], order[1:]), strict=False):
        one, other = (Asked(str(root), tuple(tokens), (), 0) for root, tokens in (pairs[i], pairs[j]))
        assert overlap == common(one, other)


def test_long_shared_prefixes_cost_no_more_than_their_tokens() -> None:
    """4,000 prompts behind 10 prefixes of 4,000 tokens, 16 million in all: sorted by windows, not one by one."""
    rng = np.random.default_rng(3)
    stems, n = rng.integers(0, 100_000, (10, 4000), dtype=np.int32), 4_000
    tokens = np.concatenate([stems[rng.integers(0, 10, n)], rng.integers(0, 100_000, (n, 4), dtype=np.int32)], axis=1)
    lengths = np.full(n, 4004, dtype=np.int64)
    padded = np.concatenate([tokens.ravel(), np.full(PAD, -1, dtype=np.int32)])
    prompts = Prompts(padded, np.arange(n) * 4004, lengths, np.zeros(n, dtype=np.int64))
    started = time.process_time()
    order = sort_prompts(prompts)
    shared = overlaps(prompts, order[:-1], order[1:])
    assert time.process_time() - started < 5.0  # a tenth of this on a quiet machine
    assert (shared >= 4000).sum() == n - 10
    assert order.tolist() == np.lexsort(tokens[:, [4003, 4002, 4001, 4000, 1, 0]].T).tolist()


def test_a_long_chain_of_prefixes_costs_no_more_than_n_log_n() -> None:
    """Prompt i is the first i + 1 tokens of one text, served in random order: every path is as deep as can be."""
    n = 30_000
    rng = np.random.default_rng(4)
    started = time.process_time()
    tree = build_tree(np.arange(n, dtype=np.int64))
    served = rng.permutation(n)
    found = staircases(tree, served, np.arange(n), np.full(n, NO_LIMIT))
    assert time.process_time() - started < 5.0
    for p in (0, 17, n // 2, n - 30):
        expected: list[tuple[int, int]] = []
        reached = 0
        for later in range(p + 1, n):  # the nearest first: each step must reach deeper than those before it
            depth = int(min(served[p], served[later])) + 1
            if depth > reached:
                expected.append((depth, later))
                reached = depth
        steps = slice(found.start[p], found.start[p + 1])
        assert list(zip(found.depth[steps], found.index[steps], strict=True)) == expected[::-1]
