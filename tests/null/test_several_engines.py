"""A job on several devices: the bytes of one, no row twice, and engines that die or are slow while others go on."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from echo_job import ROWS, EchoJob, chat, completion, interrupt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from several import Log, Several, on_devices, run_on

import shoal
from shoal.client import EngineProcess, News
from shoal.core.errors import EngineDied, ShoalError, UsageError
from shoal.jobs.devices import Device
from shoal.jobs.engines import DEATHS, LOADS
from shoal.jobs.feed import Feed
from shoal.jobs.fleet import Fleet, Member
from shoal.jobs.lanes import Lane
from shoal.jobs.options import Order
from shoal.jobs.patience import Patience
from shoal.jobs.stop import Stop


def shared_rows(count: int, groups: int, luck: random.Random) -> list[str]:
    """Rows behind a few long beginnings, in any order, asked for in several ways."""
    stems = [[luck.randrange(300, 900) for _ in range(luck.randrange(20, 90))] for _ in range(groups)]
    rows = []
    for i in range(count):
        prompt = luck.choice(stems) + [luck.randrange(300, 900) for _ in range(luck.randrange(1, 20))]
        how: dict[str, Any] = luck.choice([{}, {"n": 3}, {"temperature": 0.8, "seed": i}, {"max_tokens": 12}])
        rows.append(completion(i, prompt, **{"max_tokens": luck.randrange(1, 9), **how}))
    luck.shuffle(rows)
    return rows


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from(list(Order)))
def test_the_bytes_are_those_of_one_engine(tmp_path_factory: pytest.TempPathFactory, seed: int, order: Order) -> None:
    luck = random.Random(seed)
    rows = shared_rows(luck.randrange(1, 80), luck.randrange(1, 6), luck)
    rows.insert(luck.randrange(len(rows) + 1), "no row")
    found = []
    for devices in ("0", "0,1", "0,1,2"):
        one = EchoJob(tmp_path_factory.mktemp("job"), rows, options={"order": order})
        log = Log()
        assert run_on(one, Several, devices, log) == 3
        found.append(sorted(one.out.read_bytes().splitlines()) if order is Order.FINISH else one.final())
        ids = Counter(request.id for _, request in log.requests)
        assert not ids or max(ids.values()) == 1, "no request is handed out twice"
        report = one.report
        assert not report.problems() and report.rows.ended == len(rows)
        if order is not Order.INPUT:
            assert report.again.other == 0, "all that is computed again has the reason that it has"
            assert report.tokens.prompt_computed <= report.tokens.prompt_bound + report.again.apart
        if devices != "0":
            assert sum(engine.rows for engine in report.engines) == len(rows) - 1 - report.reused.duplicates
            assert sum(engine.prompt_computed for engine in report.engines) == (
                report.tokens.prompt_computed + report.tokens.prompt_last
            )
    assert found[0] == found[1] == found[2]


def test_every_engine_keeps_to_its_cores_and_to_its_share_of_memory(job) -> None:
    begun = []

    class Noted(Several):
        def begin(self, begin: Any) -> None:
            begun.append((self.place, begin.config.device, begin.config.memory_bytes, begin.share))

    one = job(ROWS)
    assert run_on(one, Noted, "0,1,2,3", memory=1000) == 0
    assert Noted.places == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert begun == [(0, "cpu", 250, 4), (2, "cpu", 250, 4), (4, "cpu", 250, 4), (6, "cpu", 250, 4)]


def test_an_engine_in_place_of_another_is_told_how_much_that_had(job) -> None:
    begun = []

    class Noted(Breaks):
        def begin(self, begin: Any) -> None:
            begun.append(begin.kv_bytes)

    assert run_on(job(ROWS), Noted, "0,1") == 0
    assert begun == [None, None, 1 << 20, 1 << 20]


def test_an_engine_that_cannot_be_built_is_named(job) -> None:
    class Refuses(Several):
        def ready(self, timeout: float) -> Any:
            if self.place:
                raise UsageError("there is no room")
            return super().ready(timeout)

    with pytest.raises(ShoalError, match="engine 1: there is no room") as caught:
        run_on(job(ROWS), Refuses, "0,1")
    assert caught.value.exit_code == 2


def test_a_job_begun_on_two_devices_goes_on_with_one_and_the_other_way_round(job, unbroken) -> None:
    for first, then in (("0,1", "cpu"), ("0", "0,1,2")):

        class Stops(Several):
            rounds_of_all = 0

            def outputs(self, timeout: float) -> News | None:
                type(self).rounds_of_all += 1
                interrupt(30)(type(self).rounds_of_all)
                return super().outputs(timeout)

        one = job(ROWS)
        assert run_on(one, Stops, first) == 5
        assert 0 < one.report.rows.ended < len(ROWS)
        assert run_on(one, Several, then) == 0
        assert one.final() == unbroken and not one.report.problems() and one.report.runs == 2


class Slow(Several):
    """The first engine takes a step only now and then."""

    def outputs(self, timeout: float) -> News | None:
        self.rounds += 1
        return None if self.place == 0 and self.rounds % 10 else self._backend.outputs(timeout)


def test_of_a_slow_engine_others_take_over(job, unbroken) -> None:
    rows = [completion(i, [300 + i % 40] * 20 + [i], max_tokens=4) for i in range(400)]
    even, slow = job(rows), job(rows)
    assert run_on(even, Several, "0,1") == 0
    assert run_on(slow, Slow, "0,1") == 0
    assert slow.final() == even.final()
    first, second = (engine.rows for engine in even.report.engines)
    assert abs(first - second) < 100
    first, second = (engine.rows for engine in slow.report.engines)
    assert second > 3 * first, "what was to be the slow engine's went to the other"
    assert slow.report.again.other == 0


class Breaks(Several):
    """Each engine dies once, in a round of its own; row 7 kills whoever runs it."""

    deadly = 0

    def dies(self, running: set[int]) -> bool:
        return (self.number <= 2 and self.rounds == 5 + 3 * self.number) or self.deadly in running


def test_an_engine_that_dies_is_replaced_while_the_other_goes_on(job, unbroken) -> None:
    one, log = job(ROWS), Log()
    assert run_on(one, Breaks, "0,1", log) == 0
    assert one.final() == unbroken
    assert Breaks.made == 4 and one.report.engine_restarts == 2 and not one.report.problems()
    assert "while the others go on" in one.said and sum(engine.rows for engine in one.report.engines) == len(ROWS)


def test_a_row_that_kills_its_engine_fails_alone(job, unbroken) -> None:
    class Deadly(Breaks):
        deadly = 7

    one = job(ROWS)
    assert run_on(one, Deadly, "0,1") == 3
    assert one.codes() == ["engine_died"] and one.failures()[0]["x_shoal"]["line"] == 7
    lines = unbroken[0].splitlines(keepends=True)
    assert one.out.read_bytes() == b"".join(lines[:6] + lines[7:])
    assert not one.report.problems()


def test_rows_of_the_other_engine_end_while_one_is_loaded(job) -> None:
    class Late(Several):
        """Its first engine dies; the one after it takes many rounds to load."""

        waits = 0

        def ready(self, timeout: float) -> Any:
            if self.number == 3:
                type(self).waits += 1
                if type(self).waits < 60:
                    return None
            return super().ready(timeout)

        def dies(self, running: set[int]) -> bool:
            return self.number == 1 and self.rounds == 3

    one = job([chat(i) for i in range(200)])
    done: list[int] = []
    take = Feed.take

    def noted(feed: Feed, output: Any) -> Any:
        ended = take(feed, output)
        if 0 < Late.waits < 60 and ended[0] is not None:
            done.append(ended[0].line)
        return ended

    with mock.patch.object(Feed, "take", noted):
        assert run_on(one, Late, "0,1") == 0
    assert Late.made == 3 and len(done) > 20
    assert one.report.rows.ok == 200


def test_engines_that_die_for_ever_end_the_job(job) -> None:
    class Never(Several):
        def dies(self, running: set[int]) -> bool:
            return self.place == 0 and bool(running)

    class Unloadable(Several):
        def dies_loading(self) -> bool:
            return self.place != 0

    with pytest.raises(ShoalError, match="times without completing a row"):
        run_on(job([chat(i) for i in range(400)]), Never, "0,1")
    assert Never.made >= DEATHS
    with pytest.raises(ShoalError, match="engine 1: .* while it loaded the model"):
        run_on(job(ROWS), Unloadable, "0,1")
    assert Unloadable.made == 1 + LOADS


def test_answers_are_verified_and_reused_on_several_devices(job, tmp_path: Path) -> None:
    rows = [chat(i, f"Question {i % 90}", temperature=0) for i in range(130)]
    one, plain = job(rows), job(rows)
    assert plain.run() == 0
    assert run_on(one, Several, "0,1", verify=1.0, cache=tmp_path / "cache") == 0
    assert one.final() == plain.final()
    assert one.report.verified.rows == len(rows) and not one.report.verified.differ
    assert one.report.reused.duplicates == 40
    assert sum(engine.rows for engine in one.report.engines) == len(rows) - one.report.reused.duplicates
    warm = job(rows)
    assert run_on(warm, Several, "0,1", cache=tmp_path / "cache") == 0
    assert warm.final() == plain.final() and warm.report.tokens.prompt_computed == 0


def test_a_row_that_ran_for_too_long_ends_wherever_it_runs(job) -> None:
    rows = [chat(i, max_tokens=900, ignore_eos=True, temperature=0, timeout=0.02) for i in range(2)]
    one = job(rows + [chat(i) for i in range(2, 20)])
    assert run_on(one, Slow, "0,1") == 3
    assert set(one.codes()) == {"row_timeout"} and len(one.answers()) >= 18
    assert not one.report.problems()


class Deaf(Several):
    """Every engine of the first two has ended when it is first told to cancel anything, and its pipe is closed then."""

    def __init__(self, threads: int = 0, cores: Sequence[int] = ()) -> None:
        super().__init__(threads, cores)
        self.closed = False

    def cancel(self, ids: Iterable[str]) -> None:
        self.closed = self.closed or self.number <= 2
        if self.closed:
            raise EngineDied("the engine process ended by itself (signal SIGKILL)")
        super().cancel(ids)

    def fileno(self) -> int:
        if self.closed:
            raise OSError("handle is closed")
        return 0


def test_engines_that_have_ended_when_late_rows_are_cancelled_are_replaced(job) -> None:
    rows = [chat(i, max_tokens=900, ignore_eos=True, temperature=0, timeout=0.02) for i in range(8)]
    one = job(rows + [chat(i) for i in range(8, 20)])

    def heard(members: list[Member], seconds: float) -> list[Member]:
        return [member for member in members if member.process is not None and member.process.fileno() == 0]

    with on_devices(Deaf), mock.patch("shoal.jobs.fleet.await_any", heard):
        assert one._run(None, {"device": "0,1"}) == 3
    assert set(one.codes()) == {"row_timeout"} and Deaf.made == 4
    assert one.report.engine_restarts == 2 and not one.report.problems()


def test_an_engine_that_has_ended_keeps_no_other_from_its_cancels() -> None:
    with on_devices(Deaf):
        first, second = Deaf(), Deaf()
        Deaf.made = 2
        third = Deaf()
        members = [
            Member(number, Device("cpu"), cast(EngineProcess, each), Patience(lambda: 1.0), begun=True, ready=True)
            for number, each in enumerate((first, second, third))
        ]
        fleet = Fleet(members, mock.Mock(), mock.Mock(), mock.Mock(), Stop())
        for member in members:
            member.running.add(f"{member.number}")
        with mock.patch.object(third._backend, "cancel") as cancel:
            fleet.cancel(["0", "1", "2"])
        cancel.assert_called_once_with(["2"])
        for number in (0, 1):
            with pytest.raises(EngineDied, match=f"engine {number}: ") as caught:
                fleet.outputs(0.0)
            assert fleet.bury(caught.value)


def test_a_row_of_which_nothing_is_to_come_takes_no_other_of_its_group_with_it() -> None:
    def parts(*lines: int) -> list[Any]:
        return [SimpleNamespace(row=SimpleNamespace(line=line)) for line in lines]

    lane = Lane(groups=deque([parts(1, 7, 2), parts(7), parts(7, 3, 7), parts(4)]), quarantine=True)
    assert lane.drop(7) == []
    assert [[part.row.line for part in group] for group in lane.groups] == [[1, 2], [3], [4]]


def test_rows_that_are_in_no_file_run_on_several_devices_too() -> None:
    rows = [f"Question {i}" for i in range(300)]
    with on_devices(Several):
        alone = {one.number: one.line for one in shoal.run(rows, chat=True, body={"max_tokens": 4}, device="0")}
    log = Log()
    with on_devices(Several, log):
        found = list(shoal.run(rows, chat=True, body={"max_tokens": 4}, device="0,1,2"))
    assert len(found) == 300 and {one.number: one.line for one in found} == alone
    shares = Counter(engine for engine, _ in log.requests)
    assert set(shares) == {0, 1, 2} and min(shares.values()) > 50


class Dies(Several):
    def dies(self, running: set[int]) -> bool:
        return self.place != 0 and self.number < 4 and self.rounds == 3


def test_rows_that_are_in_no_file_survive_an_engine() -> None:
    rows = [f"Question {i}" for i in range(100)]
    with on_devices(Dies):
        found = list(shoal.run(rows, chat=True, body={"max_tokens": 4}, device="0,1"))
    assert sorted(one.number for one in found if one.ok) == list(range(1, 101)) and Dies.made > 2
