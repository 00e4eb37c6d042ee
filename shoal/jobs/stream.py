"""Rows in, results out as they finish, for data that is in no file: the main job without its files.

It knows the rows under way and one engine; it must not know where rows come from, nor keep anything of one that is
over. Nothing is on the disk but a cache of answers where there is one: a stream that was stopped begins anew.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec
import numpy as np
from rich.console import Console

from shoal.client import Backend, News
from shoal.core.errors import EngineDied, RowError, UsageError
from shoal.jobs.cache import AnswerCache
from shoal.jobs.display import Display
from shoal.jobs.encode import Encoded
from shoal.jobs.engines import POLL
from shoal.jobs.feed import Ended, Feed
from shoal.jobs.files import DiskFiles
from shoal.jobs.fleet import employ, start_processes
from shoal.jobs.intake import Intake
from shoal.jobs.journal import DEATHS_ALLOWED
from shoal.jobs.meter import Meter
from shoal.jobs.options import JobOptions
from shoal.jobs.part import parts_of
from shoal.jobs.plan import Plan, Row, Unit
from shoal.jobs.prepare import make_manifest, open_words
from shoal.jobs.read import Source
from shoal.jobs.reuse import keep
from shoal.jobs.stop import Stop, WallClock

WINDOW = 1024  # rows under way: enough to fill every step, few enough to hold
SHARE = 4  # a part of the window that is taken at once, so that rows with one beginning come together
PROGRESS_EVERY = 0.5  # seconds
OPTIONS = frozenset(
    ("model", "adapter", "prompt", "chat", "body", "memory", "step_tokens", "device", "weights", "kv", "threads",
     "seed", "strict", "openai", "cache")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """One row that is over."""

    number: int  # of the row, from 1, in the order in which rows were taken
    row: object  # as it was given
    line: dict[str, Any]  # as it would stand in the output file of a job, or in its errors file
    texts: tuple[str, ...] = ()  # its answers; of a row that failed those that it had come to
    error: RowError | None = None

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.error is None

    @property
    def text(self) -> str:
        """Its answer, the first where it has several; the row's error where it has none, so that none is overlooked."""
        if self.error is not None:
            raise self.error
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Counts:
    """A stream at one moment. taken = answered + failed + under way."""

    taken: int = 0
    answered: int = 0
    failed: int = 0
    under_way: int = 0
    seconds: float = 0.0  # since it began

    def __str__(self) -> str:
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.answered:,} rows answered{failed}, {self.under_way:,} under way, {self.seconds:.1f} s"


class Stream(Iterator[Result]):
    """The results of rows, in the order in which they finish. Taken by one thread; the rows are read in another.

    Closing it, or leaving a `with` over it, ends what is under way and the engine.
    """

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._results = work.results()

    @property
    def counts(self) -> Counts:
        """How far it is."""
        return self._work.counts()

    def __next__(self) -> Result:
        return next(self._results)

    def close(self) -> None:
        """End it now. May be called twice."""
        self._results.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<shoal stream: {self.counts}>"


def stream(
    rows: Iterable[object],
    options: Mapping[str, Any],
    window: int = WINDOW,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    backend: Backend | None = None,
) -> Stream:
    """The results of `rows`; `shoal.run` has the words for users. `backend` replaces the engine process."""
    for name in options:
        if name not in OPTIONS:
            known = ", ".join(sorted(OPTIONS))
            raise UsageError(f"{name} is nothing that rows without files can have: leave it out; known are {known}")
    if window < 1:
        raise UsageError(f"window is {window}; it must be at least 1")
    nowhere = Path(os.devnull)
    asked = JobOptions(input=nowhere, output=nowhere, **{"quiet": True, **options})
    if asked.servers:
        raise UsageError("rows that servers are to answer must be in a file: write them to one, and name an output")
    return Stream(_Work(rows, asked, window, on_result, on_progress, backend))


class _Open:
    """The rows under way, as a feed reads them of a plan and of a file."""

    num_rows = num_units = 0  # nobody knows

    def __init__(self) -> None:
        self.given: dict[int, object] = {}  # by number, from 0
        self._raws: dict[int, bytes] = {}
        self._prompts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.given)

    def add(self, number: int, given: object, raw: bytes, prompts: int) -> None:
        self.given[number], self._raws[number], self._prompts[number] = given, raw, prompts

    def pop(self, number: int) -> object:
        del self._raws[number], self._prompts[number]
        return self.given.pop(number)

    def line(self, number: int) -> int:
        return number + 1

    def row(self, number: int) -> Row:
        return Row(number + 1, number, 0, self._prompts[number], None)

    def read(self, offset: int, length: int) -> bytes:
        """A row's text; its place is its number."""
        return self._raws[offset]

    def units_from(self, position: int = 0, wanted: object = None) -> Iterator[Unit]:
        return iter(())


class _Work:
    """What a stream does. Changed by the one thread that takes its results."""

    def __init__(
        self, rows: Iterable[object], options: JobOptions, window: int, on_result: Callable[[Result], None] | None,
        on_progress: Callable[[Counts], None] | None, backend: Backend | None,
    ) -> None:  # fmt: skip
        self._intake = Intake(iter(rows))
        self._options, self._window, self._backend = options, window, backend
        self._on_result, self._on_progress = on_result, on_progress
        self._clock, self._began, self._shown = WallClock(), time.monotonic(), 0.0
        self._open = _Open()
        self._units: deque[Unit] = deque()  # of rows that were taken, in the order in which they run
        self._ready: deque[Result] = deque()
        self._deaths: Counter[int] = Counter()  # by line
        self._taken = self._answered = self._failed = 0

    def counts(self) -> Counts:
        under_way = self._taken - self._answered - self._failed
        return Counts(self._taken, self._answered, self._failed, under_way, time.monotonic() - self._began)

    def results(self) -> Generator[Result, None, None]:
        """All of it. An error in reading a row, or in what the caller does, ends it as closing does."""
        self._began = time.monotonic()
        # The process loads its libraries while words are read and the weights are hashed.
        processes = start_processes(self._options) if self._backend is None else []
        self._display, self._cache = (
            Display(Console(stderr=True), self._clock, quiet=True),
            cast("AnswerCache | None", None),
        )
        self._engines = employ(processes, self._backend, self._options, Meter(self._began), self._display, Stop())
        try:
            self._prepare()
            while not self._intake.over or self._open or self._ready:
                self._take()
                self._compute()
                while self._ready:
                    result = self._ready.popleft()
                    if self._on_result is not None:
                        self._on_result(result)
                    yield result
                self._pass_time()
        finally:
            self._intake.close()
            self._engines.close()
            if self._cache is not None:
                self._cache.close()

    def _prepare(self) -> None:
        options = self._options
        words = open_words(options)
        with tempfile.TemporaryDirectory() as folder:
            manifest = make_manifest(options, Path(folder), DiskFiles(), words, "")
        self._encoder = words.encoder
        self._writer = words.writer(manifest.answers, options.openai)
        if options.cache is not None:
            self._cache = AnswerCache(Path(options.cache), manifest.engine)
        known = self._cache.get if self._cache is not None else None
        # A feed reads of a plan and of a file what _Open has.
        plan, source = cast(Plan, self._open), cast(Source, self._open)
        self._feed = Feed(
            plan, source, words.encoder, parts_of(words.tokenizer), lambda line: False, known, self._engines.number
        )
        self._config = replace(options.engine(), model=str(words.folder))
        self._useful = self._config.max_sequences * words.info.context
        self._engines.start(self._config, self._useful)

    # -- rows in -----------------------------------------------------------------------------------

    def _take(self) -> None:
        """Ask for rows while there is room for a part of the window, and take those that have come."""
        part = max(1, self._window // SHARE)
        if len(self._open) + self._intake.asked + part <= self._window:
            self._intake.want(part)
        idle = not (self._open or self._ready)
        given = self._intake.take(POLL if idle else 0.0)
        if idle:
            self._engines.idle()  # until now there was nothing to say
        if given:
            self._encode(given)

    def _encode(self, given: list[object]) -> None:
        """Rows to prompts, those with one beginning together; one that cannot be run is over."""
        first, self._taken = self._taken, self._taken + len(given)
        raws = [_raw(row, first + place + 1, self._options) for place, row in enumerate(given)]
        good = [place for place, raw in enumerate(raws) if isinstance(raw, bytes)]
        encoded = self._encoder.encode([cast(bytes, raws[place]) for place in good])
        units: list[tuple[str, bytes, Unit]] = []
        for place, found in zip(good, encoded, strict=True):
            if isinstance(found, Encoded):
                raw = cast(bytes, raws[place])
                self._open.add(first + place, given[place], raw, len(found.prompts))
                units += _units(first + place, found)
            else:
                raws[place] = found
        for place, error in enumerate(raws):
            if isinstance(error, RowError):
                self._fail(first + place, given[place], _text(given[place]), error)
        self._units.extend(unit for *_, unit in sorted(units, key=lambda one: one[:2]))

    def _waiting(self) -> Iterator[Unit]:
        while self._units:
            yield self._units.popleft()

    # -- the engine --------------------------------------------------------------------------------

    def _compute(self) -> None:
        """Hand in what there is, and take what comes back."""
        try:
            if self._units:
                self._feed.follow(self._waiting())
            for engine in range(self._engines.number):
                requests, watched = self._feed.next(self._clock.now(), engine)
                if requests:
                    self._engines.submit(engine, requests, watched)
            while self._feed.ready:
                self._end(self._feed.ready.pop())
            if not self._open:
                return
            if late := self._feed.late(self._clock.now()):
                self._engines.cancel(late)
            news = self._engines.outputs(0.0 if self._ready else POLL)
            if news is not None:
                self._news(news)
            elif said := self._engines.silent():
                self._display.warn(said)
        except EngineDied as death:
            self._revive(death)

    def _news(self, news: News) -> None:
        self._feed.started(news.started, self._clock.now())
        cancel: list[str] = []
        for output in news.outputs:
            ended, stopped = self._feed.take(output)
            cancel += stopped
            if ended is not None:
                self._engines.answered(news.engine)
                self._end(ended)
        if cancel:
            self._engines.cancel(cancel)

    def _revive(self, death: EngineDied) -> None:
        """Start another engine in place of a dead one, and give up on a row that has killed it twice alone."""
        self._engines.bury(death)
        for line in self._feed.died(death.engine):
            self._deaths[line] += 1
            if self._deaths[line] > DEATHS_ALLOWED:
                error = RowError("the engine died twice while it ran this row alone", "engine_died")
                self._end(self._feed.fail(line, error))
        self._engines.revive(death.engine, self._config, self._useful, lambda: None)

    # -- results out -------------------------------------------------------------------------------

    def _end(self, ended: Ended) -> None:
        given = self._open.pop(ended.row)
        self._deaths.pop(ended.line, None)
        if self._cache is not None:
            keep(ended, self._cache, self._clock.now())
        if ended.error is not None:
            self._fail(ended.row, given, ended.raw, ended.error, ended.had)
            return
        line = msgspec.json.decode(self._writer.answer(ended.spec, ended.answers))
        texts = tuple(sample.text for answer in ended.answers for sample in answer.samples)
        self._answered += 1
        self._ready.append(Result(ended.line, given, line, texts))

    def _fail(self, number: int, given: object, raw: bytes | None, error: RowError, had: tuple[str, ...] = ()) -> None:
        line = msgspec.json.decode(self._writer.failure(number + 1, raw, error, had))
        self._failed += 1
        self._ready.append(Result(number + 1, given, line, had, error))

    def _pass_time(self) -> None:
        now = self._clock.now()
        if self._cache is not None:
            self._cache.tick(now)
            if said := self._cache.complaint():
                self._display.warn(said)
        if self._on_progress is not None and (
            now - self._shown > PROGRESS_EVERY or (self._intake.over and not self._open)
        ):
            self._shown = now
            self._on_progress(self.counts())


def _raw(row: object, number: int, options: JobOptions) -> bytes | RowError:
    """A row as the line of a file: a mapping as it is, a text as what a model is to go on with."""
    if isinstance(row, str):
        if options.prompt is not None or options.chat:
            row = {"prompt": row}
        else:
            url, body = "/v1/completions", {"prompt": row}
            row = {"custom_id": f"{number}", "method": "POST", "url": url, "body": body}
    if not isinstance(row, Mapping):
        return RowError(f"a row is a dict or a text, not {type(row).__name__}: make one of it", "malformed_row")
    try:
        return msgspec.json.encode(row)
    except (TypeError, ValueError, RecursionError) as error:
        return RowError(f"the row cannot be written as JSON ({error}): make its values plain", "malformed_row")


def _text(row: object) -> bytes:
    """A row that cannot be run, as far as it can be shown."""
    try:
        return msgspec.json.encode(row)
    except (TypeError, ValueError, RecursionError):
        return repr(row)[:500].encode("utf-8", "backslashreplace")


def _units(number: int, found: Encoded) -> Iterator[tuple[str, bytes, Unit]]:
    """The prompts of a row with what puts them in order: bytes compare faster than numbers."""
    for place, tokens in enumerate(found.prompts):
        ask = found.asks[place] if found.asks else b""
        unit = Unit(-1, -1, number, place, tokens, found.samples, None, ask)
        yield found.root, np.frombuffer(tokens, dtype=np.int32).astype(">i4").tobytes(), unit
