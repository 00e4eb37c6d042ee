"""One level of sharing: the paper's rule never beats the exact grouping, which never beats sharing at every level."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from shoal.jobs.arena import PAD
from shoal.jobs.enlarge import Group, exact_groups, paper_groups, saved_by
from shoal.jobs.plan_order import Tree, build_tree
from shoal.jobs.plan_sort import Prompts, overlaps, sort_prompts

Sequences = list[tuple[int, ...]]


def sorted_tree(sequences: Sequences) -> tuple[Sequences, Tree, int]:
    """The prompts in sorted order, their tree, and what sharing at every level saves."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    padded = np.array([token for s in sequences for token in s] + [-1] * PAD, dtype=np.int32)
    prompts = Prompts(padded, np.cumsum(lengths) - lengths, lengths, np.zeros(len(sequences), dtype=np.int64))
    order = sort_prompts(prompts)
    lcp = np.append(0, overlaps(prompts, order[:-1], order[1:]))
    return [sequences[i] for i in order], build_tree(lcp), int(lcp.sum())


def random_set(rng: random.Random, most: int) -> Sequences:
    """Prompts behind stems behind stems, as an evaluation with tasks and subtasks has them."""
    stems: Sequences = [()]
    for _ in range(rng.randrange(1, 7)):
        stems.append(rng.choice(stems) + tuple(rng.randrange(50) for _ in range(rng.randrange(1, 30))))
    n = rng.randrange(1, most)
    return [rng.choice(stems) + tuple(rng.randrange(50) for _ in range(rng.randrange(1, 12))) for _ in range(n)]


def check_groups(sequences: Sequences, groups: list[Group]) -> None:
    """Every prompt is in one group, and prefix plus own suffix is the prompt again."""
    assert sorted(place for group in groups for place in group.places) == list(range(len(sequences)))
    for group in groups:
        prefix = sequences[group.places[0]][: group.depth]
        assert len(prefix) == group.depth
        suffixes = [sequences[place][group.depth :] for place in group.places]
        assert [prefix + suffix for suffix in suffixes] == [sequences[place] for place in group.places]


def brute_force(tree: Tree) -> int:
    """The best saving over all sets of open nodes."""
    best = 0
    for size in range(len(tree)):
        for opened in combinations(range(len(tree) - 1), size):
            saved = -sum(int(tree.depth[v]) for v in opened)
            for leaf in tree.leaf_parent.tolist():
                v = leaf
                while v not in opened and v != tree.parent[v]:
                    v = int(tree.parent[v])
                saved += int(tree.depth[v])
            best = max(best, saved)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_rule_is_at_most_exact_and_exact_at_most_every_level(seed: int) -> None:
    rng = random.Random(seed)
    total = np.zeros(4)
    for _ in range(100):
        sequences, tree, every_level = sorted_tree(random_set(rng, 40))
        paper, exact = paper_groups(tree), exact_groups(tree)
        check_groups(sequences, paper)
        check_groups(sequences, exact)
        assert saved_by(paper) <= saved_by(exact) <= every_level
        total += saved_by(paper), saved_by(exact), every_level, sum(map(len, sequences))
    assert total[0] >= 0.9 * total[1]  # the rule is a good one, if not the best


def test_exact_is_the_best_of_all_sets_of_groups() -> None:
    rng = random.Random(9)
    for _ in range(60):
        _, tree, _ = sorted_tree(random_set(rng, 8))
        assert saved_by(exact_groups(tree)) == brute_force(tree)


def test_the_rule_lifts_a_fork_that_shares_more_than_it_repeats() -> None:
    short, long = (1, 2), tuple(range(10, 40))
    sequences, tree, every_level = sorted_tree([(*short, *long, 90 + i) for i in range(3)] + [(*short, 7), (*short, 8)])
    groups = paper_groups(tree)
    assert sorted((group.depth, len(group.places)) for group in groups) == [(2, 2), (32, 3)]
    assert saved_by(groups) == 2 + 64 == every_level - 2
    check_groups(sequences, groups)


def test_prompts_that_share_nothing_stay_alone() -> None:
    _, tree, every_level = sorted_tree([(i, 1, 2) for i in range(5)])
    assert every_level == saved_by(paper_groups(tree)) == saved_by(exact_groups(tree)) == 0
