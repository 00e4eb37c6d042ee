"""The rows in flight: what goes into the engine next, and what has come back of each row.

It knows the plan, the rows' words and the engine's answers; it must not know where results are kept, nor the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from shoal.core.errors import RowError, StateError
from shoal.core.types import Finish, Output, Request, Tokens, TokenScore
from shoal.jobs.answer import PromptAnswers, Sample, count_tokens
from shoal.jobs.cache import Kept
from shoal.jobs.encode import RowEncoder
from shoal.jobs.lanes import Lane, Lanes
from shoal.jobs.part import Part, loop_period
from shoal.jobs.passing_encode import PassingEncoder
from shoal.jobs.plan import Plan, Unit
from shoal.jobs.read import Source
from shoal.jobs.replies import ReplyPart
from shoal.jobs.schema import RowSpec
from shoal.jobs.supply import Dealt, InTurn, Supply
from shoal.jobs.watches import Straggler, Watches

QUARANTINE = 8  # after a death, the rows that were in the engine come back in about so many groups

Known = Callable[[bytes, int], Kept | None]  # the sample of this number of requests with this key
AnyPart = Part | ReplyPart


@dataclass(slots=True)
class Row:
    """One row in flight."""

    number: int  # from 0 in the plan
    line: int
    raw: bytes | None
    spec: RowSpec
    left: int  # requests that have not ended
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)  # by prompt number and sample index
    prompts: dict[int, Tokens] = field(default_factory=dict)
    asks: dict[int, bytes] = field(default_factory=dict)  # by prompt number: its request's key
    scores: dict[int, list[TokenScore]] = field(default_factory=dict)
    error: RowError | None = None
    began: float | None = None  # when the first of its requests ran
    seconds: dict[str, float] = field(default_factory=dict)
    cached: int = 0  # prompt tokens
    kept: int = 0  # samples that were not computed
    preemptions: int = 0
    loop: int = 0  # period of an answer that was cut off while it repeated itself
    late: bool = False  # it has run for too long: what is left of it is not run


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that is over: its answers, or why there are none."""

    row: int  # from 0 in the plan
    line: int
    raw: bytes | None
    spec: RowSpec
    answers: tuple[PromptAnswers, ...]
    error: RowError | None
    stats: dict[str, object]
    asks: tuple[bytes, ...] = ()  # keys of the prompts' requests; empty where nothing has the same answer
    had: tuple[str, ...] = ()  # of a row that ran for too long: its texts so far


class Feed:
    """Hands out requests in plan order and gathers their outputs into rows. Changed by the job's loop alone."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        encoder: RowEncoder | PassingEncoder,
        part: Callable[[Row, int, Request], AnyPart],
        done: Callable[[int], bool],
        known: Known | None = None,
        engines: int = 1,
    ) -> None:
        """`part` says what a request of a row comes to, `done` of an input line whether it has ended in an earlier run;
        `known` has the samples of requests that need not be computed, by the request's key and the sample's number;
        so many `engines` run the rows."""
        self.source, self.encoder, self._part = source, encoder, part
        self._done, self._known = done, known
        self._lanes = Lanes(Lane() for _ in range(engines))
        self.replan(plan)
        self._ahead: set[int] = set()  # positions of units that were taken before their turn
        self._gap = 0  # row: those from the one that holds back the output up to here have ended
        self._hurried = -1  # row that was last moved up
        self._rows: dict[int, Row] = {}
        self._watches = Watches()
        self._drained: float | None = None  # when the last request had started
        self._first: deque[AnyPart] = deque()  # to be handed out before anything new
        self.apart = 0  # prompt tokens computed again because an engine has not what another has, of earlier plans
        self.prompt_tokens = 0  # of requests handed out
        self.ready: list[Ended] = []  # rows that were over as soon as they were opened; taken by the caller

    @property
    def over(self) -> bool:
        """Whether every row has been handed out and has come back."""
        return self._lanes.idle and not self._first and self._supply.over

    # -- out ---------------------------------------------------------------------------------------

    def replan(self, plan: Plan) -> None:
        """Follow another plan of the same rows; nothing of the one before has been handed out yet."""
        self.plan = plan

        def wanted(number: int) -> bool:
            return not self._done(plan.line(number))

        engines = len(self._lanes)
        self._supply: Supply = InTurn(plan.units_from(wanted=wanted)) if engines == 1 else Dealt(plan, wanted, engines)

    @property
    def lost_apart(self) -> int:
        """Prompt tokens that were computed again because an engine has not what another has."""
        return self.apart + self._supply.apart

    def next(self, now: float, engine: int = 0) -> tuple[list[Request], frozenset[str]]:
        """Requests to hand in to an engine now [s], and which of them to watch because their text may end them."""
        lane = self._lanes[engine]
        parts = [part for part in self._take(engine, lane) if not self._skipped(part.row)]
        for part in parts:
            lane.add(part)
            part.handed = now
            self.prompt_tokens += len(part.request.prompt)
        return [part.request for part in parts], frozenset(p.request.id for p in parts if p.watched)

    def hurry(self, written: int) -> None:
        """With so many rows written, in input order: if the next alone holds back more than half the file, hand it
        out before anything else. Its requests leave the plan: what they compute again is the price, and nobody keeps
        memory for them. (Rows that hold back much together stay: moving them all up would undo the plan.)"""
        plan = self.plan
        self._gap = max(self._gap, written + 1)
        while self._gap < plan.num_rows and self._done(plan.line(self._gap)):
            self._gap += 1
        if 2 * (self._gap - written - 1) <= plan.num_rows or written == self._hurried:
            return
        self._hurried = written
        for unit in plan.units_of(written):
            if not self._supply.taken(unit.position) and unit.position not in self._ahead:
                self._ahead.add(unit.position)
                self._first += self._open(replace(unit, index=-1, futures=None))

    def lead(self, row: int) -> None:
        """Run a row in place of one that asks for the same, before anything else."""
        for unit in self.plan.units_like(row):
            self._first += self._open(unit)

    def follow(self, units: Iterator[Unit]) -> None:
        """Hand out these instead of what the plan has left."""
        self.apart = self.lost_apart
        self._supply = InTurn(units, len(self._lanes))

    def _take(self, engine: int, lane: Lane) -> list[AnyPart]:
        if lane.quarantine:
            suspects = lane.suspects()
            if suspects or lane.quarantine:
                return suspects
        parts: list[AnyPart] = []
        room = self._supply.room(engine, len(lane.unstarted))
        while len(parts) + len(self.ready) < room and (self._first or not self._supply.over):
            if self._first:
                parts.append(self._first.popleft())
                continue
            busy = [each.busy + (len(parts) if each is lane else 0) for each in self._lanes]
            unit = self._supply.next(engine, busy)
            if unit is None:
                break
            if unit.position in self._ahead:
                self._ahead.remove(unit.position)
            else:
                parts += self._open(unit)
        return parts

    def _open(self, unit: Unit) -> list[AnyPart]:
        row = self._rows.get(unit.row)
        if row is None:
            line, raw, spec = self.read(unit.row)
            row = self._rows[unit.row] = Row(unit.row, line, raw, spec, self.plan.row(unit.row).prompts * spec.n)
        row.prompts[unit.prompt] = unit.tokens
        if unit.ask:
            row.asks[unit.prompt] = unit.ask
        requests = self.encoder.requests(row.line, row.spec, unit.prompt, unit.tokens, unit.index, unit.futures)
        return [
            self._part(row, unit.prompt, request)
            for sample, request in enumerate(requests)
            if not self._recalled(row, unit, sample) and not self._skipped(row)
        ]

    def _skipped(self, row: Row) -> bool:
        """Whether a request is not to be run because its row has run for too long; it is over then."""
        if row.late:
            row.left -= 1
            if row.left == 0:
                self.ready.append(self._close(row))
        return row.late

    def _recalled(self, row: Row, unit: Unit, sample: int) -> bool:
        """Whether a sample need not be computed; it is then among those of its row."""
        kept = self._known(unit.ask, sample) if self._known is not None and unit.ask else None
        if kept is None:
            return False
        row.samples[unit.prompt, sample] = kept.sample
        row.loop = max(row.loop, loop_period(row.spec, kept.sample))
        if kept.scores:
            row.scores[unit.prompt] = list(kept.scores)
        row.left -= 1
        row.kept += 1
        if row.left == 0:
            self.ready.append(self._close(row))
        return True

    def read(self, number: int) -> tuple[int, bytes | None, RowSpec]:
        """Line number, text and meaning of row `number`."""
        place = self.plan.row(number)
        raw = self.source.read(place.offset, place.length)
        try:
            return place.line, raw, self.encoder.parse(raw)
        except RowError as error:
            raise StateError(
                f"line {place.line} of the input is not what it was when the job began ({error}): "
                "bring the file back as it was and run the same command again"
            ) from error

    # -- back --------------------------------------------------------------------------------------

    def started(self, ids: Iterable[str], now: float, again: Iterable[str] = ()) -> None:
        """These requests run from now [s] on; those in `again` ran before and did not since: their time begins anew."""
        for id in again:
            if (lane := self._lanes.of(id)) is not None:
                self._watches.stop(id)
                lane.parts[id].row.began = None
        for id in ids:
            if (lane := self._lanes.of(id)) is not None:
                lane.unstarted.discard(id)
                self._start(lane.parts[id], now)
        if self._drained is None and self._lanes.started and not self._first and self._supply.over:
            self._drained = now

    def _start(self, part: AnyPart, now: float) -> None:
        row = part.row
        if row.began is None:
            row.began = now
        limit = row.spec.body.timeout
        if self._watches.start(part.request.id, now, None if limit is None else row.began + limit - now):
            row.seconds["queue"] = max(row.seconds.get("queue", 0.0), now - part.handed)

    def late(self, now: float) -> list[str]:
        """Requests to cancel because they, or others of their rows, have run for longer than their rows allow."""
        cancel: list[str] = []
        for id in self._watches.late(now):
            row = self._lanes.part(id).row
            if not row.late:
                row.late = True
                words = f"the row ran for more than the {row.spec.body.timeout:g} s of its timeout"
                row.error = row.error or RowError(words, "row_timeout", "timeout")
                cancel += [id for id, part in self._lanes.parts() if part.row is row and not part.cancelled]
        return cancel

    def ages(self, now: float) -> list[float]:
        """For how many seconds each request has run that runs now."""
        return self._watches.ages(now)

    def straggler(self, now: float) -> Straggler | None:
        """The row that has run longest of those that run."""
        oldest = self._watches.oldest(now)
        if oldest is None:
            return None
        alone = 0.0 if self._drained is None else min(now - self._drained, oldest[1])
        return Straggler(self._lanes.part(oldest[0]).row.line, oldest[1], alone)

    def longest(self, now: float, most: int) -> list[Straggler]:
        """Up to `most` rows that run, those that have run longest first."""
        found: dict[int, float] = {}
        for id, seconds in islice(self._watches.running(now), 8 * most):  # a row may have many requests
            found.setdefault(self._lanes.part(id).row.line, seconds)
        return [Straggler(line, seconds) for line, seconds in islice(found.items(), most)]

    def take(self, output: Output) -> tuple[Ended | None, list[str]]:
        """News of one request: the row that it completes, if it does, and requests to cancel."""
        lane = self._lanes.of(output.id)
        if lane is None:
            return None, []
        part = lane.parts[output.id]
        part.extend(output)
        cancel: list[str] = []
        if part.over and output.finish is None and not part.cancelled:
            part.cancelled = True
            cancel.append(output.id)
        if output.finish is None:
            return None, cancel
        lane.remove(output.id)
        self._watches.stop(output.id)
        return self._end(part, output), cancel

    def _end(self, part: AnyPart, output: Output) -> Ended | None:
        row = part.row
        if output.timing is not None:
            timing = output.timing
            row.seconds["first"] = max(row.seconds.get("first", 0.0), timing["first"] - timing["start"])
            row.seconds["run"] = max(row.seconds.get("run", 0.0), timing["end"] - timing["start"])
            row.cached += int(timing["cached"])
            row.preemptions += int(timing["preemptions"])
        if output.finish in (Finish.REJECT, Finish.ERROR) and not part.over:
            row.error = row.error or part.error(output)
        elif (sample := part.sample(output)) is not None:
            row.samples[part.number, part.request.sampling.sample] = sample
            row.loop = max(row.loop, loop_period(row.spec, sample))
            if part.scores:
                row.scores[part.number] = list(part.scores)
        row.left -= 1
        return self._close(row) if row.left == 0 else None

    def _close(self, row: Row) -> Ended:
        del self._rows[row.number]
        answers: tuple[PromptAnswers, ...] = ()
        if row.error is None:
            answers = tuple(
                PromptAnswers(
                    row.prompts[number],
                    [row.samples[number, sample] for sample in range(row.spec.n)],
                    row.scores.get(number, ()),
                )
                for number in sorted(row.prompts)
            )
        prompt, output = count_tokens(row.spec, row.prompts.values(), row.samples.values())
        stats: dict[str, object] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "cached_tokens": row.cached,
            "preemptions": row.preemptions,
            **{f"{name}_seconds": round(value, 6) for name, value in row.seconds.items()},
        }
        if row.kept:
            stats["kept_samples"] = row.kept
        if row.loop:
            stats["loop_period"] = row.loop
        asks = tuple(row.asks[number] for number in sorted(row.asks))
        had = tuple(row.samples[place].text for place in sorted(row.samples)) if row.late else ()
        return Ended(row.number, row.line, row.raw, row.spec, answers, row.error, stats, asks, had)

    # -- a dead engine -----------------------------------------------------------------------------

    def died(self, engine: int = 0) -> list[int]:
        """An engine is gone with all it had. Its rows come back in small groups without company, so that one which
        kills the engine is found; those that only waited too, for an engine that died in the step that started a row
        had no time to say so. Returns the line of the one row that was alone when the engine died."""
        lane = self._lanes[engine]
        parts = lane.clear()
        for part in parts:
            self._watches.stop(part.request.id)
        lines = list(dict.fromkeys(part.row.line for part in parts))  # in plan order, to share prefixes
        size = max(1, -(-len(lines) // QUARANTINE))
        for first in range(0, len(lines), size):
            group = set(lines[first : first + size])
            lane.groups.append([self._fresh(part) for part in parts if part.row.line in group])
        lane.quarantine = bool(lane.groups)
        return lines if len(lines) == 1 else []

    def _fresh(self, part: AnyPart) -> AnyPart:
        part.row.began = None  # another engine, another try
        return self._part(part.row, part.number, part.request)

    def fail(self, line: int, error: RowError) -> Ended:
        """Give up on a row. What other engines have of it comes to nothing."""
        for lane in self._lanes:
            for id in lane.drop(line):
                self._watches.stop(id)
        self._first = deque(part for part in self._first if part.row.line != line)
        row = next(row for row in self._rows.values() if row.line == line)
        row.error = error
        return self._close(row)
