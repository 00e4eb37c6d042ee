"""The proof that a line depends on its input line alone, at a small size and in a few of its settings."""

from __future__ import annotations

import itertools

from benchmarks.prove_itself import LEVELS, Setting, pairwise, prove

SETTINGS = [
    Setting("benchmarks.prove_itself:Reverse", 1.0, 17, True, True, "shuffled"),
    Setting("benchmarks.prove_itself:Thief", 1.0, 256, False, True, "halves"),
    Setting("auto", 3.0, 64, True, True, "whole"),
]


def test_lines_are_the_same_over_policy_memory_chunks_overlap_reuse_and_order() -> None:
    data = prove(16, 1, "", SETTINGS)
    assert data["shown"], data


def test_every_two_levels_of_two_factors_meet_in_a_run_of_the_proof() -> None:
    settings = pairwise()
    for (name, levels), (other, more) in itertools.combinations(LEVELS.items(), 2):
        met = {(getattr(each, name), getattr(each, other)) for each in settings}
        assert met == set(itertools.product(levels, more))
