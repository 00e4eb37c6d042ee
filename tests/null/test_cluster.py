"""Simulated clusters: the same engine, one heap of events, and many steps at once that change nothing."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend import alone, cluster, programs, staged, story

from shoal.core.clock import SimClock
from shoal.core.types import Finish, Promise, Request, Sampling
from shoal.engine import Engine
from shoal.sched.cost import LinearCost
from shoal.sched.place import PLACEMENTS, Load, SameProgram
from shoal.sched.policies import POLICIES, find_policy
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policies.decode_maximal import DecodeMaximal
from shoal.sched.policies.just_in_time import JustInTime
from shoal.sched.policies.mixed import Mixed
from shoal.sched.policies.orders import EarliestDeadline, LeastAttained, ShortestFirst
from shoal.sched.policies.past_future import PastFuture
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.time_to_live import TimeToLive
from shoal.sched.policies.watermarks import Aggressive, Conservative
from shoal.sched.policies.whole_prompts import Hybrid, PrefillFirst, RequestLevel
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import END, SimExecutor
from shoal.sim.instance import vouches
from shoal.sim.program import LEAST, Program, Turn, spell


class Few(Policy):
    """At most three sequences in a step, the shortest first; a policy that remembers nothing between plans."""

    def __init__(self):
        super().__init__(Budget(128, 3))

    def rank(self, seq, view):
        return float(len(seq.tokens))


class Promised(StallFree):
    """Stall-free, with steps that its promise cuts."""

    def __init__(self):
        super().__init__(Budget(512, 64), cost=LinearCost(), promise=Promise(gap=0.01))


class Restless(Policy):
    """Its steps grow with every plan: what is planned depends on how often it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def budget(self, view):
        self.asked += 1
        return Budget(8 + self.asked % 50, 64)


EVERY = [
    Policy, BatchPolicy, Few, Promised, Restless, PastFuture, Aggressive, Conservative, PrefillFirst, Hybrid,
    RequestLevel, TimeToLive, JustInTime, DecodeMaximal, Mixed, StallFree, ShortestFirst, EarliestDeadline,
    LeastAttained,
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6), policy=st.sampled_from(EVERY),
    blocks=st.integers(12, 200), rate=st.floats(0.5, 200.0), number=st.integers(1, 3),
    place=st.sampled_from(sorted(PLACEMENTS)), size=st.sampled_from([1, 16]),
)  # fmt: skip
def test_many_steps_at_once_are_the_same_as_one_by_one(seed, policy, blocks, rate, number, place, size):
    runs = []
    for leaps in (True, False):
        done = cluster([policy() for _ in range(number)], blocks * 16 // size, size, leaps, 0, PLACEMENTS[place]())
        done.run(programs(seed, 25, rate, 60))
        schedulers = [instance.engine.scheduler for instance in done.instances]
        for scheduler in schedulers:
            scheduler.kv.audit(scheduler.live())
        counters = [scheduler.counters for scheduler in schedulers]
        runs.append((story(done), counters, [scheduler.kv.pool.holders for scheduler in schedulers], done.clock.now()))
    assert runs[0] == runs[1]
    assert all(record.finish is not None for record in done.records)


def test_every_policy_with_a_name_is_held_to_that():
    assert {find_policy(name) for name in POLICIES} <= set(EVERY)


def test_nobody_is_taken_for_steady_who_answers_otherwise_than_the_class_that_said_so():
    class Moody(StallFree):
        def rank(self, seq, view):
            return float(seq.produced % 7)

    class Waiting(StallFree):
        def hear(self, program, tool, now):
            self.heard = program

    assert vouches(StallFree) and vouches(Promised) and vouches(Waiting) and not vouches(Moody)
    assert all(vouches(kind) for kind in (DecodeMaximal, Aggressive, PastFuture, TimeToLive, Mixed, Hybrid))


def test_most_decode_steps_are_leapt_over_and_none_where_the_policy_might_change_its_mind():
    for policy, least, most in ((Policy, 0.9, 1.0), (BatchPolicy, 0.9, 1.0), (Restless, 0.0, 0.0)):
        done = cluster([policy()], 400)
        done.run([alone(i, 2.0 * i, 30, 200) for i in range(20)])
        steps = done.instances[0].engine.scheduler.steps
        assert least * steps <= done.instances[0].leapt <= most * steps


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", [Policy, BatchPolicy, Few])
def test_a_cluster_of_one_is_the_engine(policy, ahead):
    """The same requests given to the engine's own loop come to the same tokens in the same steps at the same times."""
    jobs = [(20 + 3 * i, 5 + 7 * i % 40) for i in range(30)]
    done = cluster([policy()], 90, ahead=ahead)
    done.run([alone(i, 0.0, *job) for i, job in enumerate(jobs)])
    clock, scheduler = SimClock(), Scheduler(policy(), 90, 16)
    lengths = {f"r{i}": answer for i, (_, answer) in enumerate(jobs)}
    engine = Engine(scheduler, SimExecutor(clock, LinearCost(), lengths), clock, ahead)
    for i, (prompt, _) in enumerate(jobs):
        engine.add(Request(f"r{i}", spell(((i + 1000, prompt),)), Sampling(max_tokens=10_000, stop=frozenset({END}))))
    ends, times = {}, {}
    while engine.busy:
        for out in engine.step():
            times.setdefault(out.id, []).extend([clock.now()] * len(out.tokens))
            if out.finish:
                ends[out.id] = out.finish
    assert times == {record.id: list(record.times) for record in done.records}
    assert ends == {record.id: record.finish for record in done.records}
    assert scheduler.counters == done.instances[0].engine.scheduler.counters


def test_lengths_are_what_the_executor_was_told_and_nobody_else():
    seen = []

    class Nosy(Policy):
        def accept(self, request, view):
            seen.append((request.guess, request.sampling.max_tokens, request.future))
            return ""

    done = cluster([Nosy()], 100)
    records = done.run([alone(i, 0.1 * i, 10, 3 + i, 50) for i in range(10)])
    assert [len(record.times) for record in records] == [3 + i for i in range(10)]
    assert seen == [(None, 50, None)] * 10


def test_a_turn_comes_when_its_pause_is_over_and_finds_what_was_said():
    def turns(seed):
        return next(p for p in programs(seed, 40, 50.0, 60) if isinstance(p.turns, tuple) and len(p.turns) == 3)

    program = turns(3)
    records = cluster([Policy()], 400).run([program])
    assert [record.program for record in records] == [program.id] * 3
    for before, record, turn in zip(records, records[1:], program.turns[1:], strict=False):
        said = before.prompt + len(before.times)
        assert record.arrival == pytest.approx(before.end + turn.pause)
        assert record.prompt == said + turn.num_tokens
        assert said - 16 <= record.cached <= said  # whole blocks, without the last token


def test_programs_tell_the_policy_of_their_tools_and_of_their_end():
    heard = []

    class Listening(Policy):
        def hear(self, program, tool, now):
            heard.append((program, tool))

    turns = (Turn(((1, 5),), 3, 9, tool="search"), Turn(((2, 5),), 3, 9, 1.0, "shell"), Turn(((3, 5),), 3, 9))
    cluster([Listening()], 50).run([Program("p", 0.0, turns), alone(1, 0.0, 5, 3)])
    assert heard == [("p", "search"), ("p", "shell"), ("p", "")]


def test_clients_in_a_closed_loop_never_have_more_than_one_request_each():
    luck = random.Random(2)
    loop = programs(0, 0, 1.0, 40)
    records = cluster([Policy()], 200).run(loop)
    assert len(records) == 6 and luck
    for record in records:
        together = [r for r in records if r.arrival <= record.arrival < r.end]
        assert len(together) <= 2


def test_a_refusal_is_a_record_and_the_next_of_the_client_comes():
    records = cluster([Policy()], 10).run([alone(0, 0.0, 500, 3), alone(1, 0.0, 10, 3)])
    assert [record.finish for record in records] == [Finish.REJECT, Finish.STOP]
    assert "kv_exhausted" in records[0].error


def test_what_has_not_ended_when_time_is_up_says_so():
    records = cluster([Policy()], 100).run([alone(0, 0.0, 10, 5), alone(1, 0.0, 10, 4000)], until=1.0)
    assert records[0].finish is Finish.STOP and records[1].finish is None


def test_pieces_of_the_same_text_begin_alike_and_others_do_not():
    a, b = spell(((7, 100), (8, 40))), spell(((7, 100), (9, 40)))
    assert a[:100] == b[:100] == spell(((7, 500),))[:100]
    assert not set(a[100:]) & set(b[100:])
    assert min(a) >= LEAST and isinstance(a, array) and a.itemsize == 4


def test_programs_stay_together_and_work_is_spread():
    place = SameProgram()
    loads = [Load(3, 500), Load(1, 20), Load(9, 20)]
    request = Request("a", array("i", [5]), program="p")
    assert place.choose(request, loads) == 1
    loads[1].prompt = 9000
    assert place.choose(request, loads) == 1
    assert place.choose(Request("b", array("i", [5]), program="q"), loads) == 2


def test_of_programs_that_never_end_only_some_places_are_remembered():
    place, loads = SameProgram(most=10), [Load(), Load()]
    for i in range(100):
        place.choose(Request("a", array("i", [5]), program="kept"), loads)
        place.choose(Request("a", array("i", [5]), program=f"p{i}"), loads)
    assert len(place._places) == 10 and "kept" in place._places and "p99" in place._places


# -- stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 4])
def test_a_sequence_is_in_at_most_one_step_in_flight_and_every_stage_takes_one_at_a_time(stages):
    spans = []  # (stage, from, to)

    def per_stage(step):
        flying.append({part.ticket for part in step.slices})
        assert not any(a & b for i, a in enumerate(flying) for b in flying[i + 1 :])
        return [1e-3 * len(step.slices)] * stages

    flying: list[set[int]] = []
    done = staged(Policy(Budget(64, 8)), stages, per_stage)
    instance = done.instances[0]
    finish = instance.engine.finish

    def forget():
        flying.pop(0)
        return finish()

    instance.engine.finish = forget
    records = done.run([alone(i, 0.0, 30, 20) for i in range(24)])
    assert all(record.finish is Finish.STOP for record in records) and not spans


def test_even_steps_leave_no_bubbles_and_uneven_ones_do():
    """Four stages: with steps that all take as long no stage waits once the first step has come through."""

    def idle(seconds):
        done = staged(Policy(Budget(512, 8)), 4, lambda step: [seconds(step)] * 4)
        done.run([alone(i, 0.0, 30 + 200 * (i % 3), 60) for i in range(32)])
        executor = done.instances[0].executor
        assert sum(executor.bubbles.values()) >= executor.idle
        return executor.idle / (executor.idle + executor.busy)

    even, uneven = idle(lambda step: 0.01), idle(lambda step: 0.002 + 1e-3 * step.num_tokens)
    assert even < 0.1 and uneven > 4 * even, (even, uneven)


def test_stages_beside_each_other_are_faster_than_one_after_the_other():
    def run(stages, each):
        done = staged(Policy(Budget(64, 8)), stages, lambda step: [each] * stages)
        done.run([alone(i, 0.0, 10, 50) for i in range(32)])
        return done.clock.now()

    assert run(4, 0.01) < 0.5 * run(1, 0.04)


def test_a_prompt_that_fills_memory_starts_although_what_it_shares_ends_inside_a_block():
    """The block that it would copy from is one block too many: it is computed again instead."""
    done = cluster([Policy()], 12)
    shared = [Program(f"p{k}", 10.0 * k, (Turn(((1, 135), (2 + k, 45)), 3, 3),)) for k in range(2)]
    assert [record.finish for record in done.run(shared)] == [Finish.STOP] * 2
