"""The rows in flight: what goes into the engine next, and what has come back of each row.

It knows the plan, the rows' words and the engine's answers; it must not know where results are kept, nor the engine.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.core.errors import RowError, StateError
from shoal.core.types import TOKEN, Finish, Output, Request, Tokens, TokenScore
from shoal.jobs.answer import PromptAnswers, Sample
from shoal.jobs.cache import Kept
from shoal.jobs.encode import RowEncoder
from shoal.jobs.plan import Plan, Unit
from shoal.jobs.read import Source
from shoal.jobs.schema import RowSpec
from shoal.text.detok import Detokenizer
from shoal.text.tokenizer import Tokenizer

WINDOW = 1024  # requests that wait in the engine: enough to choose from, few enough to look at in every step
QUARANTINE = 8  # after a death, the rows that were in the engine come back in about so many groups

EXHAUSTED = "kv_exhausted: "
CONSTRAINT = "constraint: "

Known = Callable[[bytes, int], Kept | None]  # the sample of this number of requests with this key


@dataclass(slots=True)
class _Part:
    """One request in flight, and what has come of it."""

    row: _Row
    number: int  # of the prompt within the row
    request: Request
    detok: Detokenizer
    cancelled: bool = False  # a stop string ended it; the engine may not know yet
    text: list[str] = field(default_factory=list)
    tokens: Tokens = field(default_factory=lambda: array(TOKEN))
    logprobs: list[TokenScore] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
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
    seconds: dict[str, float] = field(default_factory=dict)
    cached: int = 0  # prompt tokens
    kept: int = 0  # samples that were not computed
    preemptions: int = 0


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


class Feed:
    """Hands out requests in plan order and gathers their outputs into rows. Changed by the job's loop alone."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        encoder: RowEncoder,
        tokenizer: Tokenizer,
        done: Callable[[int], bool],
        known: Known | None = None,
    ) -> None:
        """`done` says of an input line whether it has ended in an earlier run; `known` has the samples of requests
        that need not be computed, by the request's key and the sample's number."""
        self.source, self.encoder, self.tokenizer = source, encoder, tokenizer
        self._done, self._known = done, known
        self.replan(plan)
        self._position = -1  # in the plan, of the unit taken last
        self._ahead: set[int] = set()  # positions of units that were taken before their turn
        self._gap = 0  # row: those from the one that holds back the output up to here have ended
        self._hurried = -1  # row that was last moved up
        self._rows: dict[int, _Row] = {}
        self._parts: dict[str, _Part] = {}
        self._unstarted: set[str] = set()
        self._first: deque[_Part] = deque()  # to be handed out before anything new
        self._groups: deque[list[_Part]] = deque()  # suspects: each group runs with nobody else in the engine
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

    def next(self) -> tuple[list[Request], frozenset[str]]:
        """Requests to hand in now, and which of them to watch because a stop string may end them."""
        parts = self._take()
        for part in parts:
            self._parts[part.request.id] = part
            self._unstarted.add(part.request.id)
            self.prompt_tokens += len(part.request.prompt)
        return [part.request for part in parts], frozenset(p.request.id for p in parts if p.row.spec.stop)

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
        self._units = units

    def _take(self) -> list[_Part]:
        if self._groups or self._quarantine:
            if self._parts:
                return []
            self._quarantine = bool(self._groups)
            if self._groups:
                return self._groups.popleft()
        parts: list[_Part] = []
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

    def _open(self, unit: Unit) -> list[_Part]:
        row = self._rows.get(unit.row)
        if row is None:
            line, raw, spec = self.read(unit.row)
            row = self._rows[unit.row] = _Row(unit.row, line, raw, spec, self.plan.row(unit.row).prompts * spec.n)
        row.prompts[unit.prompt] = unit.tokens
        if unit.ask:
            row.asks[unit.prompt] = unit.ask
        requests = self.encoder.requests(row.line, row.spec, unit.prompt, unit.tokens, unit.index, unit.futures)
        return [
            _Part(row, unit.prompt, request, self._detokenizer(row.spec))
            for sample, request in enumerate(requests)
            if not self._recalled(row, unit, sample)
        ]

    def _recalled(self, row: _Row, unit: Unit, sample: int) -> bool:
        """Whether a sample need not be computed; it is then among those of its row."""
        kept = self._known(unit.ask, sample) if self._known is not None and unit.ask else None
        if kept is None:
            return False
        row.samples[unit.prompt, sample] = kept.sample
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

    def _detokenizer(self, spec: RowSpec) -> Detokenizer:
        body = spec.body
        keep = bool(body.include_stop_str_in_output)
        return Detokenizer(self.tokenizer, body.skip_special_tokens is not False, spec.stop, keep, body.min_tokens or 0)

    # -- back --------------------------------------------------------------------------------------

    def started(self, ids: Iterable[str]) -> None:
        """These requests run now."""
        for id in ids:
            self._unstarted.discard(id)

    def take(self, output: Output) -> tuple[Ended | None, list[str]]:
        """News of one request: the row that it completes, if it does, and requests to cancel."""
        part = self._parts.get(output.id)
        if part is None:
            return None, []  # of an engine that has died since, or of a row that failed
        stop_token = output.finish is Finish.STOP and bool(output.tokens)
        self._extend(part, output, stop_token)
        cancel: list[str] = []
        if part.detok.stopped is not None and output.finish is None and not part.cancelled:
            part.cancelled = True
            cancel.append(output.id)
        if output.finish is None:
            return None, cancel
        del self._parts[output.id]
        self._unstarted.discard(output.id)
        return self._end(part, output), cancel

    def _extend(self, part: _Part, output: Output, stop_token: bool) -> None:
        if part.detok.stopped is not None:
            return
        body = part.row.spec.body
        shown = output.tokens[:-1] if stop_token and not body.include_stop_str_in_output else output.tokens
        part.text.append(part.detok.push(shown))
        part.scores += output.scores
        if part.detok.stopped is not None:
            used = part.detok.num_tokens - len(part.tokens)
            part.tokens.extend(output.tokens[:used])
            part.logprobs += output.logprobs[:used]
        else:
            part.tokens.extend(output.tokens)
            part.logprobs += output.logprobs

    def _end(self, part: _Part, output: Output) -> Ended | None:
        row = part.row
        if output.timing is not None:
            timing = output.timing
            row.seconds["queue"] = max(row.seconds.get("queue", 0.0), timing["start"] - timing["arrival"])
            row.seconds["first"] = max(row.seconds.get("first", 0.0), timing["first"] - timing["start"])
            row.seconds["run"] = max(row.seconds.get("run", 0.0), timing["end"] - timing["start"])
            row.cached += int(timing["cached"])
            row.preemptions += int(timing["preemptions"])
        if output.finish in (Finish.REJECT, Finish.ERROR) and part.detok.stopped is None:
            row.error = row.error or _row_error(output.error)
        else:
            part.text.append(part.detok.finish())
            row.samples[part.number, part.request.sampling.sample] = _sample(part, output)
            if part.scores:
                row.scores[part.number] = part.scores
        row.left -= 1
        return self._close(row) if row.left == 0 else None

    def _close(self, row: _Row) -> Ended:
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
        stats: dict[str, object] = {
            "prompt_tokens": sum(len(prompt) for prompt in row.prompts.values()),
            "completion_tokens": sum(len(sample.tokens) for sample in row.samples.values()),
            "cached_tokens": row.cached,
            "preemptions": row.preemptions,
            **{f"{name}_seconds": round(value, 6) for name, value in row.seconds.items()},
        }
        if row.kept:
            stats["kept_samples"] = row.kept
        asks = tuple(row.asks[number] for number in sorted(row.asks))
        return Ended(row.number, row.line, row.raw, row.spec, answers, row.error, stats, asks)

    # -- a dead engine -----------------------------------------------------------------------------

    def died(self) -> list[int]:
        """The engine is gone with all it had. Its rows come back in small groups without company, so that one which
        kills the engine is found; those that only waited too, for an engine that died in the step that started a row
        had no time to say so. Returns the line of the one row that was alone when the engine died."""
        parts = list(self._parts.values())
        self._parts.clear()
        self._unstarted.clear()
        lines = list(dict.fromkeys(part.row.line for part in parts))  # in plan order, to share prefixes
        size = max(1, -(-len(lines) // QUARANTINE))
        for first in range(0, len(lines), size):
            group = set(lines[first : first + size])
            self._groups.append([self._fresh(part) for part in parts if part.row.line in group])
        self._quarantine = bool(self._groups)
        return lines if len(lines) == 1 else []

    def _fresh(self, part: _Part) -> _Part:
        return _Part(part.row, part.number, part.request, self._detokenizer(part.row.spec))

    def fail(self, line: int, error: RowError) -> Ended:
        """Give up on a row that is not in the engine."""
        self._groups = deque(group for group in self._groups if all(part.row.line != line for part in group))
        self._first = deque(part for part in self._first if part.row.line != line)
        row = next(row for row in self._rows.values() if row.line == line)
        row.error = error
        return self._close(row)


def _row_error(text: str) -> RowError:
    if text.startswith(EXHAUSTED):
        return RowError(text.removeprefix(EXHAUSTED), "kv_exhausted", "max_tokens")
    if text.startswith(CONSTRAINT):
        return RowError(text.removeprefix(CONSTRAINT), "invalid_constraint")
    return RowError(text, "internal")


def _sample(part: _Part, output: Output) -> Sample:
    finish: Literal["stop", "length"] = "length" if output.finish is Finish.LENGTH else "stop"
    reason: int | str | None = None
    if part.detok.stopped is not None:
        finish, reason = "stop", part.detok.stopped
    elif output.finish is Finish.STOP and part.tokens and part.tokens[-1] in (part.row.spec.body.stop_token_ids or ()):
        reason = part.tokens[-1]
    return Sample("".join(part.text), part.tokens, finish, reason, part.logprobs, output.vector or ())
