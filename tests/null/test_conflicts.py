"""Where two systems want the same decision: a test for each resolution that is not beside the system it belongs to."""

from __future__ import annotations

import random

import pytest
from serving import ask, mixture, serve, whole
from test_policies import NAMES, make

from shoal.core.types import Finish, Promise
from shoal.sched.cost import LinearCost
from shoal.sched.forecast import Futures
from shoal.sched.policies.decode_maximal import DecodeMaximal
from shoal.sched.policies.serving import Serving
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget


def test_one_composer_makes_the_steps_of_sarathi_and_of_sarathi_serve():
    """With one prompt a step and the same budget, the two differ in nothing."""

    class OnePrompt(StallFree):
        items = 1

        def tokens(self, view):
            return 96 + sum(len(s.tokens) - s.computed <= 1 for s in view.running)

        def admit(self, seq, reach, view):
            return float("inf") if len(view.running) >= 8 else super().admit(seq, reach, view)

    assert issubclass(DecodeMaximal, Serving) and issubclass(StallFree, Serving)
    luck = random.Random(1)
    requests = [ask(f"r{i}", luck.randrange(20, 400), 40, luck, arrival=0.02 * i) for i in range(30)]
    lengths = {r.id: luck.randrange(5, 40) for r in requests}
    ours = serve(DecodeMaximal(Budget(2048, 8), chunk_tokens=96), requests, lengths, 2000)
    theirs = serve(OnePrompt(Budget(2048, 8)), requests, lengths, 2000)
    assert [step for _, step in ours.steps] == [step for _, step in theirs.steps]


def test_drafts_end_a_sequence_sooner_and_take_room_beside_it():
    """SmartSpec beside Past-Future: finish times follow the tokens a step, and each row has its slots."""
    plain, drafting = Futures(16), Futures(16)
    for remaining in (100, 200, 300):
        plain.push(remaining, 500)
        drafting.push(remaining, 500, pace=3.0, slots=4)
    assert drafting.peak(0) == pytest.approx(plain.peak(0) + 3 * 4 / 16, abs=0.5)
    crowd = [Futures(16), Futures(16)]
    for futures, pace in zip(crowd, (1.0, 3.0), strict=True):
        futures.push(300, 100)
        futures.push(90, 400, pace=pace)
    assert crowd[1].peak(0) < crowd[0].peak(0), "what ends sooner leaves before the other has grown"


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_sheds_load(name):
    """Shedding would have to be the same for all that are compared: nobody does."""
    requests, lengths = mixture(9, 40, rate=4000.0)
    served = serve(make(name, Budget(64, 4)), requests, lengths, 40)
    assert {out.finish for out in served.ends.values()} <= {Finish.STOP, Finish.LENGTH}


@pytest.mark.parametrize("name", NAMES)
def test_what_can_never_fit_is_refused_at_once_and_says_what_to_do(name):
    served = serve(make(name), [ask("big", 700, 10), ask("small", 30, 10)], {"big": 5, "small": 5}, 40)
    assert served.ends["big"].finish is Finish.REJECT and "--memory" in served.ends["big"].error
    assert served.ends["small"].finish is Finish.STOP


@pytest.mark.parametrize("name", ["past-future", "stall-free", "just-in-time", "mixed", "time-to-live"])
def test_with_twice_the_demand_for_memory_nothing_falls_off_a_cliff(name):
    """KV demand twice the memory, prompts as dear as answers: 95 % of the best number of rows at once."""
    luck = random.Random(5)
    requests = [ask(f"r{i}", luck.randrange(100, 300), 200, luck) for i in range(160)]
    lengths = {r.id: luck.randrange(80, 120) for r in requests}
    blocks, cost = 32 * 300 // 16 // 2, LinearCost((4e-3, 2e-4, 5e-8, 1e-10))
    best = min(
        serve(StallFree(Budget(2048, seats)), requests, lengths, blocks, cost=cost).clock.now()
        for seats in (12, 14, 16, 18, 20)
    )
    policy = make(name, Budget(2048, 32))
    policy.promise = Promise()
    served = serve(policy, requests, lengths, blocks, cost=cost)
    whole(served, lengths)
    assert served.clock.now() <= best / 0.95
