"""What a run is told of itself decides nothing, and stays what it was through kills and resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from echo_job import ROWS, EchoJob, Mortal, Watched, echo_backend
from test_live_report import broken_at, meta

from shoal.jobs.foretold import SOON, Course, Foretold, Tail
from shoal.jobs.tally import look_report
from shoal.preview.foresee import Foreseer

Jobs = Callable[..., EchoJob]
SAID = Foretold(10, (5, 50), (1.0, 2.0), (0, 9))


class Steady:
    """A course that has always as many seconds left."""

    def __init__(self, said: Foretold = SAID, left: float = 7.0) -> None:
        self.said, self._left = said, left

    def ended(self, row: int, tokens: int) -> None:
        """It learns nothing."""

    def left(
        self, seconds: float, tokens: int, output: int, running: Sequence[float], tail: Tail = "fit"
    ) -> float | None:  # fmt: skip
        return {"fit": 1.0, "least": 0.5, "most": 2.0}[tail] * self._left


class Says:
    """Foretells each job as it was told to."""

    def __init__(self, course: Callable[[], Course]) -> None:
        self._course = course

    def free(self) -> int:
        return 1 << 30

    def foretell(self, *_: Any) -> Course:
        return self._course()


def raises(*_: Any) -> Any:
    return [][3]


class Fails(Steady):
    """One that fails where it is told to."""

    def __init__(self, at: str) -> None:
        super().__init__()
        setattr(self, at, raises)


FAILING = [(raises, None), (lambda: Fails("left"), (1.0, 2.0)), (lambda: Fails("ended"), (1.0, 2.0))]


@pytest.mark.parametrize(("course", "seconds"), FAILING)
def test_whatever_a_prediction_raises_is_a_reason_in_the_report_and_the_job_goes_on(
    job: Jobs, unbroken: tuple[bytes, bytes], course: Callable[[], Course], seconds: object
) -> None:
    one = job(ROWS)
    one.seer = Says(course)
    assert one.run(echo_backend(tokens=64, sequences=8)) == 0 and one.final() == unbroken
    said = one.report.predicted
    assert said is not None and said.why == "IndexError: list index out of range" and said.seconds == seconds
    assert f"{said.lacking}  " in one.said and said.why in one.said


def test_what_is_said_when_a_twentieth_has_ended_survives_a_kill(job: Jobs) -> None:
    one = job(ROWS)
    one.seer = Says(Steady)
    with pytest.raises(KeyboardInterrupt):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(40)))
    assert not (one.state / "report.json").exists()
    said = look_report(one.out).predicted
    assert said is not None and said.soon is not None and said.soon > 7.0
    assert said.soon_span == (pytest.approx(said.soon - 3.5), pytest.approx(said.soon + 7.0))
    one.seer = Says(lambda: Steady(left=99.0))
    assert one.run() == 0 and one.report.predicted == said


def test_what_a_resumed_run_says_is_of_all_runs(job: Jobs) -> None:
    one = job(ROWS)
    one.seer = Says(Steady)
    with pytest.raises(KeyboardInterrupt):
        one.run(Watched(echo_backend(tokens=64, sequences=2), broken_at(6)))
    assert look_report(one.out).rows.ended < SOON * len(ROWS)
    meta(one, "UPDATE meta SET value=json_set(value, '$.wall', 1000.0) WHERE name='spent'")
    assert one.run() == 0
    said, seconds = one.report.predicted, one.report.seconds.wall
    assert said is not None and said.soon is not None
    assert 1007.0 < said.soon <= seconds + 7.0


def test_a_twentieth_is_of_the_rows_to_compute_whatever_their_copies_and_runs(job: Jobs) -> None:
    copies = [ROWS[0].replace("r0", f"copy{i}") for i in range(200)]
    one, ended = job([*ROWS, *copies, "{"]), list[int]()

    class Counts(Steady):
        def ended(self, row: int, tokens: int) -> None:
            ended.append(row)

    def soon(limit: int) -> Callable[[int], None]:
        """Stop when so many have ended, nothing being said before a twentieth has."""

        def watch(rounds: int) -> None:
            said = look_report(one.out).predicted
            assert said is not None
            assert (said.soon is not None) == (len(ended) >= SOON * len(ROWS))
            if len(ended) >= limit:
                raise KeyboardInterrupt

        return watch

    one.seer = Says(Counts)
    for limit in (1, 3, 9):
        with pytest.raises(KeyboardInterrupt):
            one.run(Watched(echo_backend(tokens=64, sequences=2), soon(limit)))
    assert len(ended) == len(set(ended)) < 12
    assert one.run() == 3


@pytest.mark.parametrize(("at", "begun"), [(1, False), (40, True)])
def test_what_is_said_of_the_rest_of_a_job_is_not_said_of_the_whole(job: Jobs, at: int, begun: bool) -> None:
    one = job([*ROWS, ROWS[0].replace("r0", "twin"), "{"])
    with pytest.raises(KeyboardInterrupt):
        one.run(Watched(echo_backend(tokens=64, sequences=8), broken_at(at)))
    before = look_report(one.out)
    assert before.predicted is None and (before.rows.ok > 0) == begun
    one.seer = Says(Steady)
    assert one.run() == 3
    assert (one.report.predicted is None) == begun


def test_free_memory_is_looked_at_before_the_engine_takes_it(job: Jobs) -> None:
    done = list[object]()

    class Greedy(Mortal):
        def begin(self, begin: object) -> None:
            done.append("taken")

    class Sees(Says):
        def free(self) -> int:
            done.append("looked")
            return 12345

        def foretell(self, *given: Any) -> Course:
            done.append(given[-1])
            return super().foretell(*given)

    one = job(ROWS[:9])
    one.seer = Sees(Steady)
    assert one.run_mortal(Greedy) == 0
    assert done == ["looked", "taken", 12345]


def test_a_prediction_is_of_an_engine_with_the_memory_that_was_free(job: Jobs) -> None:
    class Poor(Foreseer):
        def free(self) -> int:
            return 1

    one = job(ROWS[:9])
    one.seer = Poor()
    assert one.run() == 0
    assert one.report.predicted is not None and one.report.predicted.why.startswith("the model needs")
