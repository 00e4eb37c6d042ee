"""Live requests get what they were promised; batches get the rest, by tenant, and say when it is too little."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import COST, ask, serve, whole

from shoal.core.types import Promise
from shoal.sched.admission import Watermark
from shoal.sched.outlook import ANNOUNCED, Job, Outlook
from shoal.sched.policies.mixed import Mixed
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policy import Budget

PROMISE = Promise(0.2, 0.02)
LIMIT = Budget(4096, 256)


def live(count: int, rate: float, seed: int = 1):
    luck, now, found = random.Random(seed), 0.0, []
    for i in range(count):
        now += luck.expovariate(rate)
        found.append(ask(f"l{i:03}", luck.randrange(30, 300), 60, luck, arrival=now, promise=PROMISE))
    return found


def rows(count: int, group: str = "batch", **more):
    return [ask(f"{group}{i:03}", 200, 80, group=group, index=i, **more) for i in range(count)]


def lengths_of(requests, length: int = 40):
    return dict.fromkeys((r.id for r in requests), length)


def tail(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def waits(served, requests):
    firsts = [served.first(r.id) for r in requests]
    gaps = [gap for r in requests for gap in served.gaps(r.id)]
    return tail(firsts), tail(gaps), max(gaps)


def mixed(**more) -> Mixed:
    return Mixed(LIMIT, cost=COST, promise=PROMISE, **more)


def test_live_requests_hardly_notice_a_batch_and_it_gets_the_rest():
    asked, batch = live(60, 12.0), rows(300)
    alone = serve(mixed(), asked, lengths_of(asked), 3000)
    both = serve(mixed(), asked + batch, lengths_of(asked + batch), 3000)
    whole(both, lengths_of(asked + batch))
    assert all(both.kept(r.id) for r in asked)
    first, _, _ = waits(both, asked)
    assert first <= waits(alone, asked)[0] + 0.25 * PROMISE.first + PROMISE.gap
    until = max(served_end(both, r) for r in asked)
    done = sum(time <= until for r in batch for time in both.times[r.id])
    assert done > 2 * sum(len(both.times[r.id]) for r in asked), "the rest is most of this machine"


def served_end(served, request) -> float:
    return served.ends[request.id].timing["end"]


def test_a_batch_alone_uses_steps_as_long_as_whoever_may_come_can_bear():
    batch = rows(100)
    served = serve(mixed(), batch, lengths_of(batch), 3000)
    seconds = [COST.seconds(step) for _, step in served.steps]
    assert max(seconds) <= 0.25 * PROMISE.first * 1.001
    offline = serve(StallFree(LIMIT, cost=COST), batch, lengths_of(batch), 3000)
    assert served.clock.now() < 1.5 * offline.clock.now()


def test_only_offline_work_is_not_held_to_what_live_requests_were_promised():
    """BatchLLM beside Sarathi: the budget is that of the classes that are there."""
    batch, asked = rows(40), [ask("l", 30, 300, arrival=0.5, promise=PROMISE)]
    served = serve(mixed(), batch + asked, lengths_of(batch) | {"l": 60}, 3000)
    begin, end = served.times["l"][0], served_end(served, asked[0])
    during = [COST.seconds(step) for when, step in served.steps if begin <= when < end]
    before = [COST.seconds(step) for when, step in served.steps if when < 0.4]
    assert max(during) <= PROMISE.gap * 1.001 < max(before)


def test_a_live_request_takes_memory_from_a_batch_and_not_from_its_like():
    batch = rows(30)
    asked = [ask(f"l{i}", 600, 60, arrival=0.5 + 0.1 * i, promise=Promise(1.0, 0.05)) for i in range(4)]
    lengths = lengths_of(batch + asked)
    served = serve(mixed(), batch + asked, lengths, 200)
    whole(served, lengths)
    assert all(served.kept(r.id) for r in asked)
    assert all(served.ends[r.id].timing["preemptions"] == 0 for r in asked)


def test_nobody_loses_memory_for_a_live_request_that_rows_behind_their_pace_keep_out():
    """Rows of a job behind its pace decode before whoever waits: what they hold is nobody's to take."""
    batch = [ask(f"b{i}", 320, 100, group="job", index=i) for i in range(4)]
    calm = [ask("c0", 32, 100, group="calm", index=9)]
    asked = [ask("l0", 800, 20, arrival=0.3, promise=PROMISE)]
    everybody = batch + calm + asked
    policy = mixed(jobs={"job": Job(1e9, 1e4)}, admission=Watermark())
    served = serve(policy, everybody, lengths_of(everybody, 90), 125)
    assert served.start("l0") >= min(served.ends[r.id].timing["end"] for r in batch)
    assert served.scheduler.counters.preemptions == 0


def test_of_tenants_that_have_gone_only_some_are_remembered_and_jobs_keep_count():
    batch = [ask(f"r{i:02}", 20, 9, group=f"g{i:02}", index=i, arrival=0.3 * i) for i in range(40)]
    policy = mixed(jobs={"g01": Job(1e9, 1e4)})
    policy.most = 8
    serve(policy, batch, lengths_of(batch, 5), 400)
    assert len(policy._ended) <= 10 and len(policy._ahead) <= 10
    assert policy._ended["g01"] == 25 and "g39" in policy._ended and "g02" not in policy._ended


def test_tenants_share_the_rest_by_tokens_and_weights():
    for weight in (1.0, 3.0):
        batch = rows(150, "a") + rows(150, "b")
        policy = Mixed(Budget(256, 8), cost=COST, promise=PROMISE, weights={"b": weight})
        served = serve(policy, batch, lengths_of(batch), 3000)
        until = 0.5 * served.clock.now()
        ended = [r.group for r in batch if served_end(served, r) <= until]
        assert ended.count("b") / ended.count("a") == pytest.approx(weight, rel=0.25)


def test_idleness_earns_nothing():
    """A tenant that comes late shares from then on; it does not get all until it has caught up."""
    batch = rows(300, "a") + rows(200, "b", arrival=2.0)
    served = serve(Mixed(Budget(256, 8), cost=COST, promise=PROMISE), batch, lengths_of(batch), 3000)
    assert served.clock.now() > 7.0
    between = [r for r in batch if 3.0 <= served_end(served, r) <= 5.0]
    share = sum(r.group == "a" for r in between) / len(between)
    assert 0.35 < share < 0.65


def test_a_batch_behind_its_pace_decodes_beside_live_requests():
    """Two seats' worth of budget: with a deadline that presses, the batch is not put behind every live request."""
    asked, batch = live(150, 40.0), rows(40)
    late = Mixed(Budget(64, 8), cost=COST, promise=PROMISE, jobs={"batch": Job(40 * 240.0, 4.0)})
    calm = Mixed(Budget(64, 8), cost=COST, promise=PROMISE)
    lengths = lengths_of(asked + batch)
    pressed, rest = (serve(policy, asked + batch, lengths, 3000) for policy in (late, calm))
    until = 3.0

    def done(served) -> int:
        return sum(time <= until for r in batch for time in served.times[r.id])

    assert done(pressed) > done(rest)
    assert late.announced and not calm.announced


# -- what cannot be met is said ahead ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    pace=st.floats(0.1, 3.0), window=st.floats(10.0, 1e5), begin=st.floats(0.0, 1e4), ripple=st.floats(0.0, 0.3),
    often=st.integers(70, 2000),
)  # fmt: skip
def test_what_cannot_be_met_is_announced_a_quarter_of_the_window_ahead_and_what_can_is_not(
    pace, window, begin, ripple, often
):
    """`pace`: of what would do. Traffic ripples, some periods in the window; near 1 either answer is right."""
    import math

    job = Job(1000.0, begin + window, begin)
    outlook, said = Outlook("g", job), []
    for i in range(often + 1):
        share = i / often
        done = 1000.0 * pace * (share + ripple * math.sin(12 * math.pi * share) / (12 * math.pi))
        found = outlook.look(begin + share * window, min(done, 1000.0))
        said += [found] if found else []
    assert len(said) <= 1
    if pace < 0.8 - ripple / 2:
        assert said and said[0].now <= job.deadline - ANNOUNCED * window
        assert said[0].expected > job.deadline
    if pace > 1.2 + ripple / 2:
        assert not said


def test_a_job_that_cannot_be_met_beside_traffic_is_announced_by_the_policy():
    """Half of all time goes to live requests, and the window is half of what the batch would need."""
    asked, batch = live(400, 40.0), rows(300)
    lengths = lengths_of(asked + batch)
    plain = serve(mixed(), asked + batch, lengths, 3000)
    needed = max(served_end(plain, r) for r in batch)
    total = sum(len(r.prompt) + lengths[r.id] for r in batch)
    for factor, late in ((0.6, True), (2.0, False)):
        window = needed * factor
        policy = mixed(jobs={"batch": Job(total, window)})
        serve(policy, asked + batch, lengths, 3000)
        assert bool(policy.announced) is late
        if late:
            assert policy.announced[0].now <= window * (1 - ANNOUNCED)
