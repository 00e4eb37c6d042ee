"""A silent engine is spoken of when its silence is out of proportion, and seldom."""

from __future__ import annotations

import random

import pytest

from shoal.jobs.patience import LEAST, TIMES, Patience


class Engine:
    """Processor seconds of a pretend engine."""

    spent = 0.0

    def __call__(self) -> float:
        return self.spent


@pytest.mark.parametrize("seed", range(20))
def test_steps_within_the_bound_of_those_before_are_never_spoken_of(seed: int) -> None:
    luck, now, longest, patience = random.Random(seed), 100.0, 0.0, Patience(Engine())
    patience.begin(now)
    for _ in range(30):
        step = luck.random() * max(LEAST, TIMES * longest)
        for part in range(20):
            assert not patience.words(now + part / 20 * step, 7)
        now, longest = now + step, max(longest, step)
        patience.heard(now)


def silence(patience: Patience, engine: Engine, begin: float, seconds: int, busy: float) -> list[str]:
    """What is said, looked at once a second."""
    said = []
    for second in range(seconds):
        engine.spent += busy
        said.append(patience.words(begin + second, 7))
    return [words for words in said if words]


@pytest.mark.parametrize("longest", [0.0, 3.0, 40.0])
def test_a_silence_is_spoken_of_after_its_bound_and_when_it_has_doubled(longest: float) -> None:
    engine = Engine()
    patience = Patience(engine)
    patience.begin(0.0)
    if longest:
        patience.heard(longest)
    bound = int(max(LEAST, TIMES * longest))
    assert not silence(patience, engine, longest, bound + 1, 0.0)
    said = silence(patience, engine, longest + bound + 1, 8 * bound, 0.0)
    assert len(said) == 4
    assert ("none has ended so far" in said[0]) == (not longest)
    patience.heard(longest + 10 * bound)
    assert not silence(patience, engine, longest + 10 * bound, 10 * bound, 0.0)


def test_one_that_computes_is_told_from_one_that_is_stuck() -> None:
    for busy, words in ((1.9, "it computes (190 % of a core)"), (0.0, "it uses no processor time")):
        engine = Engine()
        patience = Patience(engine)
        patience.begin(0.0)
        (said,) = silence(patience, engine, 0.0, 70, busy)
        assert words in said and "has run for 1 min 1 s, and none has ended so far" in said
