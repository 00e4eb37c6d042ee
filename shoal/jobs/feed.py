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
from shoal.jobs.part import Part, loop_period
from shoal.jobs.passing_encode import PassingEncoder
from shoal.jobs.plan import Plan, Unit
from shoal.jobs.read import Source
from shoal.jobs.replies import ReplyPart
from shoal.jobs.schema import RowSpec
from shoal.jobs.watches import Straggler, Watches

WINDOW = 1024  # requests that wait in the engine: enough to choose from, few enough to look at in every step
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
    ) -> None:
        """`part` says what a request of a row comes to, `done` of an input line whether it has ended in an earlier run;
        `known` has the samples of requests that need not be computed, by the request's key and the sample's number."""
        self.source, self.encoder, self._part = source, encoder, part
        self._done, self._known = done, known
        self.replan(plan)
        self._position = -1  # in the plan, of the unit taken last
        self._ahead: set[int] = set()  # positions of units that were taken before their turn
        self._gap = 0  # row: those from the one that holds back the output up to here have ended
        self._hurried = -1  # row that was last moved up
        self._rows: dict[int, Row] = {}
        self._parts: dict[str, AnyPart] = {}
        self._unstarted: set[str] = set()
        self._watches = Watches()
        self._drained: float | None = None  # when the last request had started
        self._first: deque[AnyPart] = deque()  # to be handed out before anything new
        self._groups: deque[list[AnyPart]] = deque()  # suspects: each group runs with nobody else in the engine
        self._quarantine = False
        self._exhausted = False
        self.prompt_tokens = 0  # of requests handed out
        self.ready: list[Ended] = []  # rows that were over as soon as they were opened; taken by the caller

    @property
    def over(self) -> bool:
        """Whether every row has been handed out and has come back."""
        return self._exhausted and not self._parts and not self._first and not self._groups

    # -- out ---------------------------------------------------------------------------------------

    def replan(self, plan: Plan) -> None:
        """Follow another plan of the same rows; nothing of the one before has been handed out yet."""
        self.plan = plan
        self._units: Iterator[Unit] = plan.units_from(wanted=lambda number: not self._done(plan.line(number)))

    def next(self, now: float) -> tuple[list[Request], frozenset[str]]:
        """Requests to hand in now [s], and which of them to watch because their text may end them."""
        parts = [part for part in self._take() if not self._skipped(part.row)]
        for part in parts:
            self._parts[part.request.id] = part
            part.handed = now
            self._unstarted.add(part.request.id)
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
            if unit.position > self._position and unit.position not in self._ahead:
                self._ahead.add(unit.position)
                self._first += self._open(replace(unit, index=-1, futures=None))

    def lead(self, row: int) -> None:
        """Run a row in place of one that asks for the same, before anything else."""
        for unit in self.plan.units_like(row):
            self._first += self._open(unit)

    def follow(self, units: Iterator[Unit]) -> None:
        """Hand out these instead of what the plan has left."""
        self._units, self._exhausted = units, False

    def _take(self) -> list[AnyPart]:
        if self._groups or self._quarantine:
            if self._parts:
                return []
            self._quarantine = bool(self._groups)
            if self._groups:
                return self._groups.popleft()
        parts: list[AnyPart] = []
        if len(self._unstarted) > WINDOW // 2:
            return parts
        while len(self._unstarted) + len(parts) + len(self.ready) < WINDOW and (self._first or not self._exhausted):
            if self._first:
                parts.append(self._first.popleft())
                continue
            unit = next(self._units, None)
            if unit is None:
                self._exhausted = True
                continue
            self._position = unit.position
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
            if (part := self._parts.get(id)) is not None:
                self._watches.stop(id)
                part.row.began = None
        for id in ids:
            self._unstarted.discard(id)
            if (part := self._parts.get(id)) is not None:
                self._start(part, now)
        if self._exhausted and self._drained is None and not (self._unstarted or self._first or self._groups):
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
            row = self._parts[id].row
            if not row.late:
                row.late = True
                words = f"the row ran for more than the {row.spec.body.timeout:g} s of its timeout"
                row.error = row.error or RowError(words, "row_timeout", "timeout")
                cancel += [id for id, part in self._parts.items() if part.row is row and not part.cancelled]
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
        return Straggler(self._parts[oldest[0]].row.line, oldest[1], alone)

    def longest(self, now: float, most: int) -> list[Straggler]:
        """Up to `most` rows that run, those that have run longest first."""
        found: dict[int, float] = {}
        for id, seconds in islice(self._watches.running(now), 8 * most):  # a row may have many requests
            found.setdefault(self._parts[id].row.line, seconds)
        return [Straggler(line, seconds) for line, seconds in islice(found.items(), most)]

    def take(self, output: Output) -> tuple[Ended | None, list[str]]:
        """News of one request: the row that it completes, if it does, and requests to cancel."""
        part = self._parts.get(output.id)
        if part is None:
            return None, []  # of an engine that has died since, or of a row that failed
        part.extend(output)
        cancel: list[str] = []
        if part.over and output.finish is None and not part.cancelled:
            part.cancelled = True
            cancel.append(output.id)
        if output.finish is None:
            return None, cancel
        del self._parts[output.id]
        self._unstarted.discard(output.id)
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

    def died(self) -> list[int]:
        """The engine is gone with all it had. Its rows come back in small groups without company, so that one which
        kills the engine is found; those that only waited too, for an engine that died in the step that started a row
        had no time to say so. Returns the line of the one row that was alone when the engine died."""
        parts = list(self._parts.values())
        self._parts.clear()
        self._unstarted.clear()
        self._watches.clear()
        lines = list(dict.fromkeys(part.row.line for part in parts))  # in plan order, to share prefixes
        size = max(1, -(-len(lines) // QUARANTINE))
        for first in range(0, len(lines), size):
            group = set(lines[first : first + size])
            self._groups.append([self._fresh(part) for part in parts if part.row.line in group])
        self._quarantine = bool(self._groups)
        return lines if len(lines) == 1 else []

    def _fresh(self, part: AnyPart) -> AnyPart:
        part.row.began = None  # another engine, another try
        return self._part(part.row, part.number, part.request)

    def fail(self, line: int, error: RowError) -> Ended:
        """Give up on a row that is not in the engine."""
        self._groups = deque(group for group in self._groups if all(part.row.line != line for part in group))
        self._first = deque(part for part in self._first if part.row.line != line)
        row = next(row for row in self._rows.values() if row.line == line)
        row.error = error
        return self._close(row)
