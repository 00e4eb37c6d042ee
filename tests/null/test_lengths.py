"""Estimates of lengths: above what is produced, at most the limit, and right as often as they say."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ask

from shoal.core.sequence import Sequence
from shoal.core.types import Request, Sampling
from shoal.sched.admission import Foreseen
from shoal.sched.lengths import Constant, LengthEstimator, LengthHistory, MeanOfGroup, Survival
from shoal.sched.policies.mixed import Mixed
from shoal.sched.quantiles import QuantileForest
from shoal.sched.scheduler import Scheduler
from shoal.sim.oracle import Oracle


def cold_history() -> LengthHistory:
    return LengthHistory(cold=True)


ESTIMATORS = [Constant, MeanOfGroup, LengthHistory, cold_history, Survival, QuantileForest, lambda: Oracle({})]
NAMES = ["constant", "mean", "history", "cold", "survival", "forest", "oracle"]


def sequence(number: int, produced: int = 0, limit: int = 1000, group: str = "", prompt=(5, 6, 7), stops=True):
    sampling = Sampling(max_tokens=limit, stop=frozenset({1}) if stops else frozenset())
    seq = Sequence(Request(f"r{number}", array("i", prompt), sampling, group=group), number)
    seq.tokens.extend([2] * produced)
    return seq


def teach(estimator: LengthEstimator, lengths, group: str = "", begin: int = 0) -> None:
    for number, length in enumerate(lengths, begin):
        estimator.learn(sequence(number, length, group=group))


@pytest.mark.parametrize("make", ESTIMATORS, ids=NAMES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 20), count=st.integers(0, 90), produced=st.integers(0, 200), limit=st.integers(1, 300),
    share=st.floats(0.0, 1.0),
)  # fmt: skip
def test_an_estimate_is_above_what_is_produced_and_not_above_the_limit(make, seed, count, produced, limit, share):
    luck = random.Random(seed)
    estimator = make()
    teach(estimator, [luck.randrange(1, 250) for _ in range(count)], "g")
    seqs = [sequence(1000 + i, min(p, limit), limit, "g") for i, p in enumerate((produced, 0, 3))]
    estimator.look(seqs)
    drawn = estimator.draw(seqs, 4, np.random.default_rng(seed))
    assert drawn.shape == (4, 3)
    for i, seq in enumerate(seqs):
        some = [*drawn[:, i], estimator.quantile(seq, share), estimator.expect(seq)]
        assert all(min(seq.produced + 1, limit) <= length <= limit for length in some)


@pytest.mark.parametrize("make", ESTIMATORS[:6], ids=NAMES[:6])
def test_an_answer_that_only_its_limit_can_end_is_certain(make):
    estimator = make()
    teach(estimator, [30] * 60)
    seq = sequence(99, 3, 500, stops=False)
    if make is not Constant:
        assert estimator.quantile(seq, 0.5) == estimator.expect(seq) == 500
        assert (estimator.draw([seq], 3, np.random.default_rng(0)) == 500).all()


def test_drawn_lengths_are_the_distribution_above_what_is_produced():
    luck, history = random.Random(1), LengthHistory(2000)
    lengths = [luck.randrange(1, 201) for _ in range(2000)]
    teach(history, lengths)
    for produced in (0, 50, 150):
        drawn = history.draw([sequence(5000, produced)] * 400, 10, np.random.default_rng(0)).ravel()
        above = sorted(x for x in lengths if x > produced)
        for share in (0.1, 0.5, 0.9):
            assert abs(np.quantile(drawn, share) - above[int(share * len(above))]) < 8


def test_without_conditioning_the_drawn_lengths_forget_what_is_produced():
    control = LengthHistory(2000, condition=False)
    teach(control, range(1, 201))
    drawn = control.draw([sequence(5000, 150)] * 500, 4, np.random.default_rng(0))
    assert (drawn == 151).mean() > 0.6, "most draws are below what there is, and only the floor holds them up"


def test_draws_and_quantiles_agree():
    history, seqs = LengthHistory(), [sequence(700 + i, p, group="g") for i, p in enumerate((0, 10, 33))]
    teach(history, [luck * 3 % 97 + 1 for luck in range(150)], "g")

    class Fixed:
        def random(self, shape):
            return np.full(shape, 0.37)

    assert [history.quantile(seq, 0.37) for seq in seqs] == history.draw(seqs, 1, Fixed())[0].tolist()


def test_a_group_of_few_answers_is_taken_to_be_like_all():
    history = LengthHistory()
    teach(history, [10] * 100, "short")
    teach(history, [400] * 49, "long", 200)
    before = history.quantile(sequence(900, group="long"), 0.5)
    teach(history, [400], "long", 300)
    assert before < 100 and history.quantile(sequence(900, group="long"), 0.5) == 400


@pytest.mark.parametrize("ended", [0, 3, 30, 100, 150])
def test_a_cold_window_is_half_as_long_as_may_be_until_it_is_full_of_answers(ended):
    history, limits = LengthHistory(200, cold=True), (700, 5000)
    teach(history, [100] * ended)
    longest = min(100, 200 - ended)
    drawn = history.draw([sequence(0, limit=most) for most in limits], 4000, np.random.default_rng(0))
    for i, most in enumerate(limits):
        assert (drawn[:, i] == most).mean() == pytest.approx((longest - 1) / (longest + ended), abs=0.04)
        assert history.quantile(sequence(0, limit=most), 0.99) == most
    teach(history, [100] * (200 - ended))
    assert (history.draw([sequence(0, limit=700)], 4000, np.random.default_rng(0)) == 700).mean() < 0.02


def test_of_many_groups_those_that_learnt_last_are_remembered():
    history = LengthHistory(most=10)
    for i in range(100):
        history.observe("kept", 5)
        history.observe(f"g{i}", 7)
        history.draw([sequence(i)], 2, np.random.default_rng(0))
    assert len(history._recent) == len(history._sorted) == 11 and "kept" in history._recent and "g99" in history._sorted


def test_who_was_asked_about_before_the_first_tree_is_asked_again():
    forest, early = QuantileForest(), sequence(0, limit=4000)
    assert forest.quantile(early, 0.95) == 4000
    for number in range(1, 81):
        forest.learn(sequence(number, 30, 4000))
    assert forest.quantile(early, 0.95) < 100


def test_nothing_is_kept_of_those_that_were_given_up():
    forest = QuantileForest()
    policy, asked = Mixed(admission=Foreseen(forest)), [ask(f"r{i}", 20, 50) for i in range(20)]
    scheduler = Scheduler(policy, 400, 16)
    for request in asked:
        scheduler.add(request, 0.0)
    scheduler.plan(0.0)
    assert forest._like
    for request in asked:
        scheduler.cancel(request.id, 1.0)
    assert not forest._like


def test_answers_that_still_run_count_as_long_ones():
    """After a change from 20 to 400 tokens only short ones have ended: the plain history has not seen the change."""
    plain, censored = LengthHistory(), Survival()
    for estimator in (plain, censored):
        teach(estimator, [20 + i % 7 for i in range(60)])
    running = [sequence(500 + i, 100) for i in range(60)]
    censored.look(running)
    assert plain.quantile(sequence(900), 0.9) < 30
    assert censored.quantile(sequence(900), 0.9) == 1000, "half of all are known to be longer than any that has ended"
    assert censored.quantile(sequence(900), 0.4) < 30


def test_kaplan_and_meier_by_hand():
    """Ended at 1, 2, 3, 3 …; running at 2: S = 9/10 · 8/9 · …, as in any text on survival."""
    curve = Survival()
    teach(curve, [1, 2, 3, 3, 4, 5, 6, 7, 8])
    curve.look([sequence(100, 2)])
    lengths, longer = curve._curve("")
    assert lengths.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert longer[:3] == pytest.approx([9 / 10, 8 / 10, 8 / 10 * 5 / 7])


KINDS = {10: (20, 40), 20: (150, 250), 30: (600, 700)}  # first token of a prompt -> lengths of its answers


def classes(count: int, seed: int) -> list[tuple[list[int], int]]:
    luck = random.Random(seed)
    found = []
    for _ in range(count):
        kind = luck.choice(list(KINDS))
        prompt = [kind] * 6 + [luck.randrange(100, 9000) for _ in range(luck.randrange(5, 60))]
        found.append((prompt, luck.randrange(*KINDS[kind])))
    return found


def taught(count: int = 600) -> QuantileForest:
    forest = QuantileForest()
    for number, (prompt, length) in enumerate(classes(count, 1)):
        first = sequence(number, 0, prompt=prompt)
        forest.quantile(first, 0.95)
        forest.learn(sequence(number, length, prompt=prompt))
    return forest


def test_a_bound_holds_as_often_as_it_says_on_requests_it_has_not_seen_and_is_sharper_than_no_features():
    forest, plain = taught(), LengthHistory(1000)
    for number, (_, length) in enumerate(classes(600, 1)):
        plain.learn(sequence(number, length))
    held, bounds, without = [], [], []
    for number, (prompt, length) in enumerate(classes(500, 2), 10_000):
        bound = forest.quantile(sequence(number, prompt=prompt), 0.95)
        held.append(length <= bound)
        bounds.append(bound)
        without.append(plain.quantile(sequence(number, prompt=prompt), 0.95))
    assert np.mean(held) >= 0.92
    assert np.mean(bounds) < 0.65 * np.mean(without), "what a prompt says is used"


def test_a_bound_tightens_while_an_answer_goes_on():
    """What is left under the bound falls faster than tokens come, or at least not slower, and never to nothing."""
    forest = taught()
    prompt = next(prompt for prompt, _ in classes(50, 9) if prompt[0] == 20)
    left = []
    for produced in range(0, 201, 20):
        bound = forest.quantile(sequence(20_000, produced, prompt=prompt), 0.95)
        assert bound >= produced + 1
        left.append(bound - produced)
    assert left[0] > 100 and all(b <= a for a, b in zip(left, left[1:], strict=False)) and left[-1] <= 60


def test_a_level_that_is_missed_too_often_is_raised():
    forest = taught()
    luck = random.Random(3)
    missed = []
    for number in range(30_000, 31_000):  # answers have become longer by half
        prompt = [20] * 6 + [luck.randrange(100, 9000) for _ in range(20)]
        bound = forest.quantile(sequence(number, prompt=prompt), 0.95)
        length = luck.randrange(225, 375)
        missed.append(length > bound)
        forest.learn(sequence(number, length, prompt=prompt))
    assert np.mean(missed[:30]) > 0.6 and np.mean(missed[-500:]) < 0.09, (np.mean(missed[:30]), np.mean(missed[-500:]))


def test_the_oracle_knows_and_lives_with_the_simulator():
    oracle = Oracle({"r1": 77})
    assert oracle.quantile(sequence(1), 0.1) == 77
    assert oracle.quantile(sequence(2, limit=9), 0.1) == 9
    assert Oracle.__module__.startswith("shoal.sim")
