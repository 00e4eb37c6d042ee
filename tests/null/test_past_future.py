"""Admission by drawn futures: between those who promise too much memory and those who promise too little."""

from __future__ import annotations

import random

from serving import ask, serve, whole

from benchmarks.prove_simulator import PAST_FUTURE, missing
from shoal.core.sequence import Sequence
from shoal.sched.admission import Foreseen, Reserved, Watermark, would_make_room
from shoal.sched.lengths import LengthHistory
from shoal.sched.policies.past_future import PastFuture
from shoal.sched.policies.watermarks import Aggressive, Conservative
from shoal.sched.policy import Budget, Reach, View
from shoal.sim.oracle import Oracle

LIMIT = Budget(4096, 512)
BLOCKS, BLOCK = 250, 16


def decode_heavy(count: int = 260, seed: int = 1):
    """Law D1 at a hundredth of its size: prompts of 1 to 40 tokens, answers of 20 to 40, with a limit of 120."""
    luck = random.Random(seed)
    requests = [ask(f"r{i:03}", luck.randrange(1, 160), 480, luck) for i in range(count)]
    return requests, {r.id: luck.randrange(80, 160) for r in requests}


def outcome(policy):
    requests, lengths = decode_heavy()
    served = serve(policy, requests, lengths, BLOCKS, BLOCK)
    whole(served, lengths)
    return served.scheduler.counters.preemptions, served.used / BLOCKS, len(served.steps)


def test_it_evicts_fewer_than_the_aggressive_and_runs_more_than_the_conservative():
    few, used, steps = outcome(PastFuture(LIMIT))
    many, full, _ = outcome(Aggressive(LIMIT))
    none, empty, longer = outcome(Conservative(LIMIT))
    assert none == 0
    assert many > 60 and few < 0.25 * many
    assert used > 2 * empty and full > 0.9
    assert steps < 0.5 * longer


def test_without_conditioning_on_what_is_produced_more_are_evicted():
    with_it, without = (outcome(PastFuture(LIMIT, reserve=0.0, condition=some, every=1))[0] for some in (True, False))
    assert without > 2 * with_it + 3


def test_true_lengths_evict_nobody():
    requests, lengths = decode_heavy()
    served = serve(PastFuture(LIMIT, lengths=Oracle(lengths), reserve=0.0), requests, lengths, BLOCKS, BLOCK)
    assert served.scheduler.counters.preemptions == 0
    assert served.used / BLOCKS > 0.75


def test_a_cold_start_is_conservative():
    requests, lengths = decode_heavy(100)
    served = serve(PastFuture(LIMIT), requests, lengths, BLOCKS, BLOCK)
    first = served.steps[0][1]
    assert len(first.starts) * 480 / BLOCK <= 1.3 * BLOCKS


def test_who_lost_its_memory_is_the_first_to_come_back():
    requests, lengths = decode_heavy()
    served = serve(Aggressive(LIMIT), requests, lengths, BLOCKS, BLOCK)
    started: dict[str, int] = {}
    for _, step in served.steps:
        new = [start.request.id for start in step.starts if start.request.id not in started]
        again = [start.request.id for start in step.starts if start.request.id in started]
        assert not (new and again) or max(again) < min(new)
        started |= dict.fromkeys([*new, *again], 1)


# -- admissions one by one ---------------------------------------------------------------------------


def running(number: int, prompt: int, produced: int, limit: int) -> Sequence:
    seq = Sequence(ask(f"r{number}", prompt, limit), number)
    seq.tokens.extend([2] * produced)
    seq.ticket, seq.computed = number, len(seq.tokens) - 1
    seq.blocks = list(range(1000 * number, 1000 * number + -(-len(seq.tokens) // BLOCK)))
    return seq


def view(seqs: list[Sequence], blocks: int) -> View:
    used = sum(len(s.blocks) for s in seqs)
    return View(0.0, blocks - used, used, blocks, BLOCK, seqs, [])


def reach(tokens: int = 0, blocks: int = 0, idle: int = 0, reserved: int = 0) -> Reach:
    return Reach(tokens, blocks, idle, reserved, lambda n: 0, lambda nodes: [])


def test_each_admission_counts_what_it_says():
    candidate = Sequence(ask("c", 64, 160), 99)
    held = [running(1, 64, 16, 160)]  # 5 blocks now, 14 at its limit
    for admission, needs in ((Watermark(1.0), 5 + 4), (Reserved(), 14 + 14)):
        for blocks, fits in ((needs - 1, False), (needs, True)):
            admission.look(view(held, blocks))
            assert admission.fits(candidate, reach(), view(held, blocks)) is fits
        admission.look(view(held, needs))
        assert not admission.fits(candidate, reach(reserved=1), view(held, needs))
        admission.look(view(held, needs))
        assert admission.fits(candidate, reach(16, 1), view(held, needs - 1)), "a block that it shares is there"


def test_a_preempted_row_is_admitted_as_a_new_one_whose_prompt_is_all_it_has():
    """JITServe's preemption beside Past-Future's admission: p := p + g."""
    fresh, back = Sequence(ask("a", 160, 320), 1), Sequence(ask("b", 32, 320), 2)
    back.tokens.extend([2] * 128)
    lengths = Oracle({"a": 10, "b": 138})

    def least(seq: Sequence) -> int:
        for blocks in range(1, 40):
            admission = Foreseen(lengths, 0.0)
            admission.look(view([], blocks))
            if admission.fits(seq, reach(), view([], blocks)):
                return blocks
        raise AssertionError

    assert least(fresh) == least(back) == -(-(160 + 10 + BLOCK) // BLOCK)


def test_who_was_let_in_counts_for_the_next():
    admission = Foreseen(Oracle({}), 0.0)
    at = view([], 30)
    admission.look(at)
    answers = [admission.fits(Sequence(ask(f"c{i}", 16, 112), i), reach(), at) for i in range(5)]
    assert answers == [True, True, True, False, False]


def test_history_is_what_admission_learns():
    history = LengthHistory()
    policy = PastFuture(LIMIT, lengths=history)
    requests, lengths = decode_heavy(80)
    serve(policy, requests, lengths, BLOCKS, BLOCK)
    assert 80 <= history.quantile(Sequence(ask("new", 5, 480), 500), 0.5) <= 160


def test_nobody_loses_memory_that_would_not_do():
    """A prompt of 10 blocks, 4 free: givers of 5 blocks are too few by one; shared ones give nothing."""
    seq = Sequence(ask("c", 10 * BLOCK, 10), 99)

    def held(blocks: int, shared: int = 0) -> list[Sequence]:
        giver = running(1, BLOCK * blocks - 1, 1, 500)
        giver.private_from = shared
        return [giver]

    def enough(givers: list[Sequence]) -> bool:
        used = sum(len(g.blocks) for g in givers)
        return would_make_room(givers, seq, reach(), View(0.0, 4, used, used + 4, BLOCK, givers, []))

    assert not enough(held(5)) and enough(held(6)) and not enough(held(6, shared=1))
    assert not enough([])


def test_the_proofs_table_says_what_does_not_come_out():
    """Each claim alone can fail, and a policy that was not run shows nothing."""
    said = ((0.5, 0.9), (0.0, 0.5), (0.02, 0.8), (0.1, 0.8), (0.0, 0.8))
    table = {
        f"d1 {policy}": {"evicted": evicted, "memory_used": used}
        for policy, (evicted, used) in zip(PAST_FUTURE, said, strict=True)
    }
    assert not missing(table, ["d1"]) and len(missing(table, ["d1", "d2"])) == 1
    wrong = {0: {"evicted": 0.2}, 1: {"memory_used": 0.7}, 3: {"evicted": 0.02}, 4: {"evicted": 0.01}}
    for place, change in wrong.items():
        name = f"d1 {PAST_FUTURE[place]}"
        assert len(missing({**table, name: {**table[name], **change}}, ["d1"])) == 1, name
