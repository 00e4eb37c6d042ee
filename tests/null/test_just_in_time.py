"""Promises that get what they need and no more; orders that are its controls."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import COST, ask, serve, whole

from shoal.core.types import Promise
from shoal.sched.lengths import LengthHistory
from shoal.sched.policies.just_in_time import JustInTime, like_lengths
from shoal.sched.policies.orders import EarliestDeadline, LeastAttained, ShortestFirst
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget
from shoal.sched.stages import COLD, Stages
from shoal.sim.oracle import Oracle


class Named:
    """Stands for a sequence where only its number counts."""

    def __init__(self, number: int) -> None:
        self.number = number


@settings(max_examples=200, deadline=None)
@given(
    some=st.lists(st.tuples(st.floats(0.1, 100.0), st.integers(1, 4000)), max_size=30),
    size=st.integers(1, 12), slack=st.floats(0.0, 0.5),
)  # fmt: skip
def test_grouping_by_length_gives_up_no_more_worth_than_the_slack(some, size, slack):
    ranked = [(worth, float(length), Named(i)) for i, (worth, length) in enumerate(some)]
    ranked.sort(key=lambda entry: (-entry[0], entry[2].number))
    found = like_lengths(ranked, size, slack)
    assert sorted(seq.number for seq in found) == sorted(range(len(some)))
    worth = {entry[2].number: entry[0] for entry in ranked}
    if len(ranked) > size:
        least = ranked[size - 1][0] * (1 - slack)
        assert all(worth[seq.number] >= least - 1e-9 for seq in found[:size])
    else:
        assert [seq.number for seq in found] == [entry[2].number for entry in ranked]


def test_the_window_takes_neighbours_in_length_of_almost_the_same_worth():
    lengths = [100, 5000, 110, 4900, 120, 105]
    worth = [10.0, 9.9, 9.8, 9.75, 9.7, 9.72]
    ranked = [(value, float(length), Named(i)) for i, (value, length) in enumerate(zip(worth, lengths, strict=True))]
    ranked.sort(key=lambda entry: -entry[0])
    assert sorted(seq.number for seq in like_lengths(ranked, 4, 0.1)[:4]) == [0, 2, 4, 5]
    assert [seq.number for seq in like_lengths(ranked, 4, 0.0)] == [0, 1, 2, 3, 5, 4]


def classes(count: int, rate: float, seed: int = 1):
    """Latency, deadline and compound requests in equal parts, and their lengths."""
    luck = random.Random(seed)
    requests, lengths, now = [], {}, 0.0
    for i in range(count):
        now += luck.expovariate(rate)
        kind = i % 3
        more = [
            {"promise": Promise(0.5, 0.05), "group": "chat"},
            {"deadline": now + luck.choice([2.0, 4.0]), "group": "report"},
            {"deadline": now + 6.0, "program": f"p{i}", "group": "agent"},
        ][kind]
        length = [luck.randrange(10, 60), luck.randrange(60, 220), luck.randrange(30, 120)][kind]
        prompt = [kind + 3] * 6 + [luck.randrange(50, 5000) for _ in range(luck.randrange(20, 200))]
        requests.append(ask(f"r{i:03}", prompt, 256, luck, arrival=now, **more))
        lengths[f"r{i:03}"] = length
    return requests, lengths


def kept(policy, requests, lengths) -> float:
    served = serve(policy, requests, lengths, 2000)
    whole(served, lengths)
    return sum(len(served.times[r.id]) for r in requests if served.kept(r.id)) / served.clock.now()


LIMIT = Budget(2048, 4)


def test_under_load_more_is_delivered_in_time_than_by_the_orders():
    """Four seats, three classes in equal parts, more requests than can all be served, and for long."""
    requests, lengths = classes(220, 18.0)
    ours = kept(JustInTime(LIMIT, cost=COST), requests, lengths)
    others = {
        "first come": kept(StallFree(LIMIT, cost=COST), requests, lengths),
        "deadline": kept(EarliestDeadline(LIMIT, cost=COST), requests, lengths),
        "shortest": kept(ShortestFirst(LIMIT, cost=COST), requests, lengths),
    }
    oracle = kept(JustInTime(LIMIT, cost=COST, lengths=Oracle(lengths)), requests, lengths)
    shortest = others.pop("shortest")
    assert ours > 1.4 * max(others.values()) and ours > 1.08 * shortest, (ours, others, shortest)
    assert ours > 0.75 * oracle


def ends_in_order(policy, requests, lengths) -> list[str]:
    served = serve(policy, requests, lengths, 2000)
    return sorted((r.id for r in requests), key=lambda id: served.ends[id].timing["end"])


@pytest.mark.parametrize("kind", [JustInTime, EarliestDeadline])
def test_with_equal_lengths_deadlines_are_kept_in_their_order(kind):
    """One seat, equal prompts and answers, time enough for all, but not in the order of arrival."""
    deadlines = [9.0, 3.0, 7.0, 5.0, 1.6]
    requests = [ask(f"r{i}", 20, 100, deadline=due) for i, due in enumerate(deadlines)]
    lengths = dict.fromkeys((r.id for r in requests), 100)
    policy = kind(Budget(256, 1), cost=COST, lengths=Oracle(lengths))
    served = serve(policy, requests, lengths, 2000)
    assert all(served.kept(r.id) for r in requests)


def test_what_is_missed_and_what_was_promised_nothing_live_on_left_overs():
    requests = [ask(f"late{i}", 50, 100, deadline=0.01) for i in range(4)]
    requests += [ask(f"none{i}", 50, 100) for i in range(4)]
    requests += [ask(f"due{i}", 50, 100, deadline=3.0) for i in range(4)]
    lengths = dict.fromkeys((r.id for r in requests), 80)
    order = ends_in_order(JustInTime(Budget(512, 4), cost=COST, lengths=Oracle(lengths)), requests, lengths)
    assert [id[:4] for id in order] == ["due0", "due1", "due2", "due3"] + ["none"] * 4 + ["late"] * 4


def test_a_broken_promise_waits_neither_for_a_batch_nor_for_ever():
    """One seat. A chat that comes too late for its first token starves behind neither a job's rows nor a stream of
    requests that were promised nothing."""
    late = ask("late", 20, 60, promise=Promise(1e-4, 0.05))
    rows = [ask(f"b{i}", 20, 60, index=i, future=()) for i in range(30)]
    stream = [ask(f"s{i}", 20, 60, arrival=0.2 * i) for i in range(60)]
    for others, latest in ((rows, 2.0), (stream, 5.0)):
        lengths = dict.fromkeys((r.id for r in [late, *others]), 50)
        policy = JustInTime(Budget(256, 1), cost=COST, lengths=Oracle(lengths))
        served = serve(policy, [late, *others], lengths, 2000)
        last = max(served.ends[r.id].timing["end"] for r in others)
        assert served.ends["late"].timing["end"] < latest < 0.5 * last


def test_once_its_late_first_token_has_come_gaps_are_kept_again():
    """As its later tokens were counted from the promise that was broken, they would all be late as well."""
    late = ask("late", 600, 60, promise=Promise(1e-4, 0.05))
    others = [ask(f"s{i}", 20, 90, arrival=0.02 + 0.3 * i) for i in range(20)]
    lengths = dict.fromkeys((r.id for r in [late, *others]), 50) | {f"s{i}": 80 for i in range(20)}
    served = serve(JustInTime(Budget(256, 1), cost=COST, lengths=Oracle(lengths)), [late, *others], lengths, 2000)
    assert max(served.gaps("late")) <= 0.05


def test_a_seat_is_lent_and_keys_and_values_stay():
    """A pressing request takes the only seat; who had it stands, and goes on without anything computed again."""
    requests = [ask("long", 100, 300), ask("now", 20, 20, arrival=0.3, promise=Promise(0.1, 0.02))]
    lengths = {"long": 250, "now": 15}
    served = serve(JustInTime(Budget(512, 1), cost=COST, lengths=Oracle(lengths)), requests, lengths, 100)
    assert served.kept("now") and max(served.gaps("long")) > 15 * COST.weights[0]
    assert served.scheduler.counters.preemptions == 0


def test_memory_is_taken_from_those_that_stand_a_few_at_a_time():
    requests = [ask(f"old{i}", 300, 200) for i in range(4)]
    requests += [ask(f"due{i}", 300, 60, arrival=0.5, deadline=2.5) for i in range(4)]
    lengths = {r.id: 180 if r.id.startswith("old") else 50 for r in requests}
    served = serve(JustInTime(Budget(1024, 4), cost=COST, lengths=Oracle(lengths)), requests, lengths, 110)
    whole(served, lengths)
    assert all(served.kept(f"due{i}") for i in range(4))
    assert 1 <= served.scheduler.counters.preemptions <= 4


def test_batch_rows_keep_the_plan_s_order_below_requests_with_promises():
    """BatchLLM beside JITServe: different classes; members of a prefix group can be held back one by one."""
    head = list(range(100, 164))
    rows = [ask(f"b{i}", [*head, 200 + i], 20, index=i, future=((64, i + 1),) if i < 5 else ()) for i in range(6)]
    live = [ask(f"l{i}", 30, 20, arrival=0.01, promise=Promise(0.2, 0.03)) for i in range(2)]
    lengths = dict.fromkeys((r.id for r in rows + live), 20)
    served = serve(JustInTime(Budget(128, 2), cost=COST, lengths=Oracle(lengths)), rows + live, lengths, 400)
    starts = [served.start(r.id) for r in rows]
    assert starts == sorted(starts)
    assert all(served.kept(r.id) for r in live)


# -- the orders ----------------------------------------------------------------------------------------


def test_the_shortest_as_predicted_goes_first():
    history = LengthHistory()
    for i in range(60):
        history.observe("short", 10 + i % 5)
        history.observe("long", 200 + i % 5)
    requests = [ask(f"l{i}", 20, 300, group="long") for i in range(3)]
    requests += [ask(f"s{i}", 20, 300, group="short", arrival=0.05) for i in range(3)]
    lengths = {r.id: 200 if r.group == "long" else 12 for r in requests}
    order = ends_in_order(ShortestFirst(Budget(256, 1), lengths=history), requests, lengths)
    assert {id[0] for id in order[:3]} == {"s"}


def test_a_program_that_has_had_much_yields_to_a_new_one():
    def turns(program: str, count: int, at: float):
        return [ask(f"{program}{i}", 300, 300, program=program, arrival=at) for i in range(count)]

    requests = turns("old", 3, 0.0) + turns("new", 1, 1.0)
    lengths = dict.fromkeys((r.id for r in requests), 200)
    order = ends_in_order(LeastAttained(Budget(512, 1)), requests, lengths)
    assert order.index("new0") < 2


def test_of_programs_that_never_say_that_they_have_ended_only_some_are_followed():
    policy = LeastAttained(Budget(512, 4))
    policy.most = 5
    requests = [ask(f"r{i:02}", 10, 5, program=f"p{i:02}") for i in range(30)]
    serve(policy, requests, dict.fromkeys((r.id for r in requests), 3))
    assert sorted(policy._attained) == [f"p{i}" for i in range(25, 30)]


# -- stages --------------------------------------------------------------------------------------------


def program(stages: Stages, name: str, times: list[float], begin: float = 0.0) -> None:
    now = begin
    for seconds in times:
        stages.arrive(name, "kind", now)
        now += seconds
        stages.leave(name, now)


def test_a_stage_s_share_of_the_deadline_is_what_such_stages_took():
    stages = Stages()
    for i in range(5):
        program(stages, f"p{i}", [1.0, 3.0, 4.0])
        stages.end(f"p{i}")
    stages.arrive("new", "kind", 10.0)
    assert stages.due("new", 26.0) == pytest.approx(10.0 + 16.0 / 8)
    stages.leave("new", 11.0)
    stages.arrive("new", "kind", 12.0)
    assert stages.due("new", 26.0) == pytest.approx(12.0 + 14.0 * 3 / 7)
    stages.leave("new", 15.0)
    stages.arrive("new", "kind", 15.0)
    assert stages.due("new", 26.0) == pytest.approx(26.0)


def test_programs_that_began_alike_say_more_and_nothing_known_leaves_time_for_as_much_again():
    stages = Stages(like=3)
    assert stages.due("unknown", 5.0) == 5.0
    stages.arrive("first", "kind", 0.0)
    assert stages.due("first", 10.0) == 10.0 * COLD
    for i in range(6):
        program(stages, f"quick{i}", [0.1, 0.1])
        stages.end(f"quick{i}")
        program(stages, f"slow{i}", [5.0, 45.0])
        stages.end(f"slow{i}")
    program(stages, "new", [5.2], 100.0)
    stages.arrive("new", "kind", 105.2)
    assert stages.due("new", 150.0) == pytest.approx(150.0)


def test_calls_side_by_side_are_one_stage():
    stages = Stages()
    for name, at in (("a", 0.0), ("a", 0.1)):
        stages.arrive(name, "kind", at)
    stages.leave("a", 1.0)
    stages.leave("a", 2.0)
    stages.end("a")
    assert list(stages._past["kind"]) == [[(2.0, 0.0)]]


@pytest.mark.parametrize("count", [4, 200])
def test_a_step_s_seconds_are_learnt_however_many_live(count):
    requests = [ask(f"r{i}", 5, 200) for i in range(count)]
    policy = JustInTime(Budget(4096, 256), cost=COST)
    served = serve(policy, requests, dict.fromkeys((r.id for r in requests), 150), 4000)
    assert policy._step == pytest.approx(served.clock.now() / len(served.steps), rel=0.1)
