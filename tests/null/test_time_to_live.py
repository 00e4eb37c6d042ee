"""Memory that outlives its turn as long as that is likely to pay, and gives way when it is not."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import COST, ask, serve

from shoal.core.clock import SimClock
from shoal.core.types import Request
from shoal.engine import Engine
from shoal.sched.admission import Watermark
from shoal.sched.calls import FEW, Calls, best_time, prior_time
from shoal.sched.cost import LinearCost
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.time_to_live import TimeToLive
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor

SLOW = LinearCost((4e-3, 5e-4, 5e-8, 1e-10))  # prompts are dear: 500 tokens are a quarter of a second


# -- the formula ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(durations=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=30), gain=st.floats(0.0, 30.0))
def test_only_durations_need_be_tried(durations, gain):
    durations = sorted(durations)

    def value(time: float) -> float:
        return sum(d <= time for d in durations) / len(durations) * gain - time

    chosen = best_time(durations, gain)
    grid = [i * 0.01 for i in range(2100)]
    assert value(chosen) >= max(map(value, grid)) - 1e-9
    assert chosen == 0.0 or value(chosen) > value(0.0)


def test_of_equals_the_shortest_time_is_taken():
    assert best_time([1.0, 2.0], 2.0) == 0.0  # 1 s gains 1 - 1, 2 s gains 2 - 2
    assert best_time([1.0, 1.0, 2.0], 3.0) == 1.0  # both gain one second
    assert best_time([1.0, 1.0, 1.0], 1.5) == 1.0
    assert best_time([], 9.0) == 0.0


@given(gain=st.floats(0.01, 50.0), mean=st.floats(0.05, 5.0))
@settings(max_examples=100, deadline=None)
def test_the_closed_form_is_the_best_of_a_grid(gain, mean):
    def value(time: float) -> float:
        return (1 - math.exp(-time / mean)) * gain - time

    found = prior_time(gain, mean)
    best = max((i * mean * 0.01 for i in range(1200)), key=value)
    assert value(found) >= value(best) - 1e-9
    assert (found == 0.0) == (gain <= mean)


def test_a_tool_is_known_by_more_than_a_hundred_calls_and_so_are_all():
    calls = Calls()
    for _ in range(FEW):
        calls.took("ls", 0.2)
    assert calls.time_to_live("ls", 3.0) == pytest.approx(math.log(3.0)), "100 are too few"
    calls.took("ls", 0.2)
    assert calls.time_to_live("ls", 3.0) == pytest.approx(0.2)
    for _ in range(FEW):
        calls.took("make", 2.0)
    assert calls.time_to_live("make", 3.0) == pytest.approx(0.2), "of its own 100 are too few: half of all are 0.2"
    calls.took("make", 2.0)
    assert calls.time_to_live("make", 3.0) == pytest.approx(2.0)
    assert calls.time_to_live("make", 1.9) == 0.0


def test_durations_below_nothing_are_no_durations():
    calls = Calls()
    for _ in range(200):
        calls.took("ls", -0.1)
    assert calls.time_to_live("ls", 0.5) == 0.0 and calls.wait == 0.0


def test_programs_of_one_length_remember_and_memoryless_ones_do_not():
    luck, fixed, free = random.Random(1), Calls(), Calls()
    assert fixed.memoryfulness == 0.0
    for _ in range(250):
        fixed.over(8)
        turns = 1
        while luck.random() > 0.2:
            turns += 1
        free.over(turns)
    assert fixed.memoryfulness == pytest.approx(1.0)
    assert abs(free.memoryfulness) < 0.35
    uneven = Calls()
    for turns in (2, 30) * 20:
        uneven.over(turns)
    assert uneven.memoryfulness > fixed.memoryfulness - 2, "no clipping: it is any correlation"


def test_waits_are_forgotten_after_many():
    calls = Calls()
    for wait in [100.0] * 10 + [1.0] * 256:
        calls.waited(wait)
    assert calls.wait == 1.0


# -- pins ----------------------------------------------------------------------------------------------


class Agents:
    """Programs that take turns: the next request has all of the turn before, its answer and what a tool said."""

    def __init__(self, count: int, turns: int, tool: float, prompt: int = 480, every: float = 0.4) -> None:
        self.turns, self.tool = turns, tool
        self.lengths: dict[str, int] = {}
        self.begin = [self.turn(f"p{i}", 0, [1000 + i] * 8 + list(range(5, prompt)), i * every) for i in range(count)]
        self.asked = {r.id: r for r in self.begin}
        self.done: dict[str, float] = {}

    def turn(self, program: str, number: int, prompt: list[int], at: float) -> Request:
        id = f"{program}.{number}"
        self.lengths[id] = 20
        return ask(id, prompt, 40, arrival=at, program=program)

    def after(self, out, engine) -> list[Request]:
        program, number = out.id.split(".")
        now = engine.clock.now()
        if int(number) + 1 == self.turns:
            engine.tell(program, "")
            self.done[program] = now - next(r for r in self.begin if r.program == program).arrival
            return []
        engine.tell(program, "ls")
        before = self.asked[out.id]
        said = [2] * (self.lengths[out.id] - 1) + [1] + [7000 + int(number)] * 30
        later = self.turn(program, int(number) + 1, [*before.prompt, *said], now + self.tool)
        self.asked[later.id] = later
        return [later]


def agents(policy, blocks: int, count: int = 8, turns: int = 6, tool: float = 0.3, every: float = 0.4):
    made = Agents(count, turns, tool, every=every)
    served = serve(policy, made.begin, made.lengths, blocks, cost=SLOW, after=made.after)
    return served, sum(made.done.values()) / len(made.done)


LIMIT = Budget(2048, 32)


def test_programs_are_done_sooner_where_memory_is_short_and_no_tail_pays_for_it():
    for blocks in (120, 180, 260):
        plain, before = agents(StallFree(LIMIT, cost=SLOW), blocks)
        pinned, after = agents(TimeToLive(LIMIT, cost=SLOW), blocks)
        assert after <= 1.02 * before, blocks
        firsts = [max(served.first(id) for id in served.asked) for served in (plain, pinned)]
        assert firsts[1] <= 1.5 * firsts[0], blocks
    assert before > 0


def test_a_pin_holds_while_others_come_and_is_over_strictly_after_its_time():
    for tool, kept in ((1.0, True), (1.0 + 1e-6, False)):
        policy = TimeToLive(LIMIT, cost=SLOW, always=1.0)
        policy.accept(ask("p.0", 5, program="p"), _view(0.0))
        program = policy._programs["p"]
        program.live, program.leaf = 0, _Leaf()
        program.waiting.clear()
        policy.hear("p", "ls", 0.0)
        policy.revalued(_view(tool))
        assert ("p" in policy._pins) is kept


def test_a_pin_whose_program_has_come_back_is_not_over():
    policy = TimeToLive(LIMIT, cost=SLOW, always=1.0)
    policy.accept(ask("p.0", 5, program="p"), _view(0.0))
    program = policy._programs["p"]
    program.live, program.leaf = 0, _Leaf()
    program.waiting.clear()
    policy.hear("p", "ls", 0.0)
    policy.accept(ask("p.1", 5, program="p"), _view(0.5))
    policy.revalued(_view(5.0))
    assert "p" in policy._pins


class _Leaf:
    writer, last_use = 1, 0.0


def _view(now: float):
    from shoal.sched.policy import View

    return View(now, 10, 0, 10, 16, [], [])


def test_what_is_pinned_is_found_again_though_others_have_filled_memory():
    """One program, then strangers enough to wash any cache, then its second turn."""

    def cached(policy) -> float:
        made = Agents(1, 2, 1.2)
        strangers = [ask(f"s{i}", 400, 10, arrival=0.5 + 0.05 * i) for i in range(12)]
        lengths = made.lengths | dict.fromkeys((r.id for r in strangers), 5)
        made.lengths = lengths

        def after(out, engine):
            return made.after(out, engine) if out.id.startswith("p") else []

        served = serve(policy, made.begin + strangers, lengths, 75, cost=SLOW, after=after)
        return served.ends["p0.1"].timing["cached"]

    assert cached(TimeToLive(LIMIT, cost=SLOW, always=5.0, patience=math.inf)) >= 480
    assert cached(TimeToLive(LIMIT, cost=SLOW, always=0.0)) < 100
    assert cached(StallFree(LIMIT, cost=SLOW)) < 100


def test_pins_make_room_when_nothing_could_go_on_the_latest_program_first():
    """Three pins fill memory, and a stranger needs more than is free: nothing runs, so pins yield."""
    made = Agents(3, 2, 4.0, every=0.5)
    stranger = ask("s", 400, 10, arrival=2.5)
    made.lengths["s"] = 5

    def after(out, engine):
        return made.after(out, engine) if out.id.startswith("p") else []

    policy = TimeToLive(LIMIT, cost=SLOW, always=10.0)
    served = serve(policy, [*made.begin, stranger], made.lengths, 104, cost=SLOW, after=after)
    assert served.first("s") < 0.5
    found = [served.ends[f"p{i}.1"].timing["cached"] for i in range(3)]
    assert found[0] >= 480 and found[0] >= found[1] >= found[2]
    assert served.scheduler.counters.preemptions == 0


def test_nobody_waits_for_ever_behind_programs_that_come_back():
    """A stranger among programs whose pins never end: it is served when it has waited a few times its share."""
    made = Agents(6, 12, 0.05, every=0.02)
    stranger = ask("s", 300, 10, arrival=0.3)
    made.lengths["s"] = 5

    def after(out, engine):
        return made.after(out, engine) if out.id.startswith("p") else []

    def waits(patience: float) -> float:
        made.__init__(6, 12, 0.05, every=0.02)
        made.lengths["s"] = 5
        policy = TimeToLive(Budget(512, 4), cost=SLOW, always=100.0, patience=patience)
        return serve(policy, [*made.begin, stranger], made.lengths, 150, cost=SLOW, after=after).first("s")

    assert waits(2.0) < 0.6 * waits(math.inf)


def test_a_program_never_heard_of_again_is_forgotten():
    from shoal.sched.policies import time_to_live

    policy = TimeToLive(LIMIT)
    for i in range(time_to_live.FOLLOWED + 50):
        policy.accept(ask(f"r{i}", [3], program=f"p{i}"), _view(0.0))
        policy._programs[f"p{i}"].live = 0
    assert len(policy._programs) <= time_to_live.FOLLOWED


def test_requests_without_a_program_are_served_as_they_come():
    requests = [ask(f"r{i}", 50, 20, arrival=0.01 * i) for i in range(10)]
    served = serve(TimeToLive(LIMIT, cost=COST), requests, dict.fromkeys((r.id for r in requests), 10), 100)
    starts = [served.start(r.id) for r in requests]
    assert starts == sorted(starts)


def returns(policy, prompt: list[int], again: list[int], **more):
    """A program whose second turn comes with another text than its first one left, and the scheduler meanwhile."""
    first = ask("p.0", prompt, 20, program="p")

    def after(out, engine):
        if out.id == "p.0":
            engine.tell("p", "ls")
            return [ask("p.1", again, 20, arrival=engine.clock.now() + 0.1, program="p")]
        if out.id == "p.1":
            engine.tell("p", "")
        return []

    return serve(policy, [first], {"p.0": 10, "p.1": 200}, after=after, **more)


def test_what_a_diverging_turn_does_not_need_is_worth_no_more_than_other_blocks():
    """From the turn's start on: its pin is over, and the blocks it kept yield by their last use."""

    class Watching(TimeToLive):
        seen: list[tuple[bool, float]]

        def revalued(self, view):
            changed = list(super().revalued(view))
            running = any(seq.request.id == "p.1" for seq in view.running)
            self.seen += [(running, self.worth(node)) for node in changed]
            return changed

    policy = Watching(LIMIT, cost=SLOW, always=1000.0)
    policy.seen = []
    returns(policy, list(range(5, 205)), list(range(1005, 1205)))
    assert [running for running, _ in policy.seen][:2] == [False, True]
    assert policy.seen[0][1] > 1e11 and policy.seen[1][1] < 1e3


def test_a_turn_that_was_served_in_vain_keeps_its_pin():
    policy, scheduler = pinned_by("p")
    waiting = next(iter(scheduler.waiting.values()))
    policy.chunk(waiting, 100, scheduler.view(1.0))
    list(policy.revalued(scheduler.view(1.0)))
    assert "p" in policy._pins and waiting.request.id in policy._programs["p"].waiting
    waiting.started = 1.0
    policy.chunk(waiting, 100, scheduler.view(1.0))
    assert "p" in policy._pins, "it had started before"


def pinned_by(*programs: str) -> tuple[TimeToLive, Scheduler]:
    """Programs whose turns have ended, all pinned, and each of which has come back and waits."""
    policy = TimeToLive(LIMIT, cost=SLOW, always=1000.0)
    scheduler = Scheduler(policy, 4000, 16)
    clock, lengths = SimClock(), {}
    engine = Engine(scheduler, SimExecutor(clock, SLOW, lengths), clock)
    for i, name in enumerate(programs):
        lengths[f"{name}.0"] = 5
        engine.add(ask(f"{name}.0", list(range(5, 85)) + [100 + i] * 80, 20, program=name))
    while engine.busy:
        engine.step()
    for name in programs:
        engine.tell(name, "ls")
    for i, name in enumerate(programs):
        engine.add(ask(f"{name}.1", list(range(5, 85)) + [100 + i] * 80 + [9] * 40, 20, program=name))
    return policy, scheduler


def test_pins_are_counted_once_a_plan_and_the_admission_is_asked_once_for_each():
    counts, asked = [], []

    class Counting(Watermark):
        def fits(self, seq, reach, view):
            asked.append((seq.request.id, reach.reserved_blocks))
            return super().fits(seq, reach, view)

    policy, scheduler = pinned_by(*(f"p{i}" for i in range(6)))
    policy.admission, count = Counting(), scheduler.kv.count_idle
    scheduler.kv.count_idle = lambda nodes: counts.append(1) or count(nodes)
    scheduler.plan(1.0)
    assert [id for id, _ in asked] == [f"p{i}.1" for i in range(6)]
    assert len(counts) == 1
    kept = [blocks for _, blocks in asked]
    assert kept[0] == 0 and kept[1:] == [5 * i for i in (4, 3, 2, 1, 0)], "each beside those that come after it"


def test_of_a_program_that_is_over_nothing_is_remembered():
    policy = TimeToLive(LIMIT, cost=SLOW)
    made = Agents(30, 3, 0.3)
    serve(policy, made.begin, made.lengths, 400, cost=SLOW, after=made.after)
    assert not policy._owner and not policy._programs and not policy._since
