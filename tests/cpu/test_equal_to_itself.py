"""The proof that a line depends on its input line alone, at a small size and in a few of its settings."""

from __future__ import annotations

from benchmarks.pairwise import covering, unmet
from benchmarks.prove_itself import FACTORS, WISHES, Setting, prove

HERE = "benchmarks.prove_itself:"
SETTINGS = [
    Setting("auto", 3.0, 100, "shuffled", True, True, 2, 32, "bf16"),
    Setting("shoal.sched.policy:Policy", 1.0, 2048, "halves", False, True, 1, 16, "bf16"),
    Setting(HERE + "Thief", 3.0, 100, "shuffled", True, False, 1, 32, "bf16"),
    Setting(HERE + "Chaos", 3.0, 32, "whole", True, True, 2, 16, "bf16"),
    Setting(HERE + "Chaos", 3.0, 100, "shuffled", True, True, 2, 32, "int8"),
    Setting(HERE + "Chaos", 3.0, 100, "shuffled", True, True, 2, 32, "int4"),
    Setting("shoal.sched.policy:Policy", 1.0, 100, "shuffled", True, True, 2, 16, "bf16/int8"),
    Setting(HERE + "Chaos", 3.0, 32, "halves", True, False, 1, 32, "bf16/int8"),
]


def test_lines_are_the_same_over_policy_memory_chunks_overlap_reuse_order_and_threads() -> None:
    data = prove(1, 1, "", SETTINGS)
    assert data["shown"], data


def test_every_two_levels_of_two_factors_meet_in_the_proof() -> None:
    assert unmet(FACTORS, covering(FACTORS)) == (386, 0)
    assert unmet(WISHES, covering(WISHES)) == (339, 0)


def test_a_pair_that_does_not_meet_is_counted() -> None:
    assert unmet({"a": "xy", "b": (1, 2)}, [{"a": "x", "b": 1}, {"a": "y", "b": 2}]) == (4, 2)
