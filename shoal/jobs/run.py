"""The main job: plan, feed, gather, keep, write, report. It knows every part of a job and does the work of none.

It must not know tensors: the engine is a process of its own, or whatever backend it is given.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from shoal.client import Backend, EngineProcess, News
from shoal.core.config import EngineConfig
from shoal.core.errors import EngineDied, RowError, ShoalError, UsageError
from shoal.jobs.blamed import Blamed
from shoal.jobs.cache import AnswerCache
from shoal.jobs.crew import on_all_cores
from shoal.jobs.display import Display, Progress
from shoal.jobs.ending import BUDGET_HIT, INTERRUPTED, ended_before, judge
from shoal.jobs.engines import POLL, Engines, open_servers
from shoal.jobs.feed import Ended, Feed, Known
from shoal.jobs.files import DiskFiles, Files
from shoal.jobs.fleet import employ, start_processes
from shoal.jobs.foretold import Seer
from shoal.jobs.meter import Meter
from shoal.jobs.note import keep_note
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.passing_encode import PassingEncoder
from shoal.jobs.plan import Order as PlanOrder
from shoal.jobs.plan import Plan, build_plan
from shoal.jobs.prepare import Prepared, ServedWords, Words, prepare
from shoal.jobs.report import NAME as REPORT
from shoal.jobs.report import write_report
from shoal.jobs.report_words import print_report
from shoal.jobs.results import Results, open_results
from shoal.jobs.retry import Again
from shoal.jobs.reuse import Reuse, forget
from shoal.jobs.state import Begin as JobBegin
from shoal.jobs.state import row_key
from shoal.jobs.stop import Stop, WallClock, stopping
from shoal.jobs.verify import Check, choose
from shoal.jobs.write import Order as WriteOrder

# codes of lines that are no requests at all
MALFORMED = frozenset(("invalid_json_line", "line_too_long", "malformed_row", "missing_field"))
LAST_STEP = 2.0  # seconds that an interrupted job waits for what the step under way brings


def run_job(
    options: JobOptions, backend: Backend | None = None, console: Console | None = None, again: Again | None = None,
    seer: Seer | None = None,
) -> int:  # fmt: skip
    """Run the job, or go on with it, to its end; with failed rows `again`. The exit code; ShoalErrors carry theirs.

    `backend` replaces the engine process: it is used as it is, and not started again when it dies. `seer` foretells
    the job.
    """
    files, began = DiskFiles(), time.monotonic()
    console = console or Console(stderr=True)
    with stopping() as stop:
        # The process loads its libraries while we read, check and plan.
        servers = open_servers(options) if backend is None else None
        engines = start_processes(options) if backend is None and not options.servers else []
        try:
            job = prepare(options, files)
            try:
                ended = job.begin is JobBegin.FINISHED and (job.state.path / REPORT).is_file() and not options.verify
                if ended and (again is None or again.idle(job.state.path)):
                    return ended_before(job, console)
                return _Job(job, files, console, stop, began, engines, backend or servers, again, seer).run()
            finally:
                job.source.close()
                job.state.close()
        finally:
            for one in (*engines, servers):
                if one is not None:
                    one.close()


class _Job:
    """One run of one job."""

    def __init__(
        self, job: Prepared, files: Files, console: Console, stop: Stop, began: float,
        processes: list[EngineProcess], backend: Backend | None, again: Again | None, seer: Seer | None,
    ) -> None:  # fmt: skip
        self.job, self.files, self.console, self.stop, self.again = job, files, console, stop, again
        self.seer = seer
        self.clock = WallClock()
        self.display = Display(console, self.clock, job.options.quiet)
        self.writer = job.writer()
        self.meter = Meter(began)
        self.engines = employ(processes, backend, job.options, self.meter, self.display, stop)
        self.budget_hit = False
        self.resumed = 0  # rows that an earlier run has ended
        self.strangers = False  # whether a row has named another model
        self.cache = AnswerCache(Path(job.options.cache), job.manifest.engine) if job.options.cache else None
        self.check: Check | None = None  # when rows run again to be compared

    def run(self) -> int:
        """Everything from the plan to the report."""
        options = self.job.options
        plan = self._plan()
        self.meter.planned(plan)
        if options.strict:
            self._refuse_malformed(plan)
        results = self._open(plan)
        try:
            self.meter.note(self.job, plan, results)
            self.meter.resume(results)
            self._refuse_bad_rows(plan, results)
            self._check_budget(results)
            self.resumed = results.status().answered - plan.num_bad
            feed = self._feed(plan, results, self.cache.get if self.cache is not None else None)
            self.reuse, self.blamed = Reuse(feed, results, self.cache), Blamed(results.journal, results.done)
            with self.display:
                self._recall(feed, results)
                self.meter.note(self.job, feed.plan, results)
                if results.status().answered < results.status().total and not (self.budget_hit or self.stop.asked):
                    foretell = self.meter.foretelling(self.seer, self.job, feed.plan, results)
                    self._start(plan if options.verify else feed.plan, foretell)
                    self.display.plan(self.meter.plan_facts(self.job, feed.plan, self.resumed))
                    self.meter.begin(self.clock.now())
                    self._loop(feed, results)
                finished = results.status().answered == results.status().total
                if finished:
                    results.finish()
                if finished and options.verify and not self.budget_hit:
                    finished = self._verify(plan, results)
                last = self._progress(feed, results)
                self.display.show(last, last=True)
            return self._end(results, last, finished)
        finally:
            self.engines.close()
            results.close()
            self.meter.close()
            if self.cache is not None:
                self.cache.close()

    def _feed(self, plan: Plan, results: Results, known: Known | None = None) -> Feed:
        return self.job.feed(plan, results.done, known, self.engines.number)

    def _plan(self) -> Plan:
        job = self.job
        own = job.words.encoder
        order: PlanOrder = "input" if job.options.order is Order.INPUT else own.order
        encoder = own if isinstance(own, PassingEncoder) else on_all_cores(own, own.model, job.source.size)
        with self.display:
            return build_plan(job.source, encoder, job.state.path, order, own.fingerprint, self._read)

    def _read(self, rows: int, size: int) -> None:
        """Between two parts of the input that is being planned: stop here if asked to."""
        if self.stop.asked:
            error = ShoalError(f"interrupted when {rows:,} rows had been read; run the same command again to continue")
            error.exit_code = INTERRUPTED
            raise error
        self.display.reading(rows, size, self.job.source.size)

    def _open(self, plan: Plan) -> Results:
        job = self.job
        order: WriteOrder = "finish" if job.options.order is Order.FINISH else "input"
        lines = array("q", plan.lines.tobytes())
        args = (job.state.path, job.options.output, job.errors, lines, order, self.files, self.clock, job.form)
        if self.again is not None:  # options that a retry changes are its own: the note is left as it is
            return self.again.open(lambda: open_results(*args), job.state)
        results = open_results(*args)
        keep_note(results.journal, job.options)
        return results

    def _refuse_malformed(self, plan: Plan) -> None:
        for _, row in plan.bad_rows():
            if row.error is not None and row.error.code in MALFORMED:
                raise UsageError(f"--strict: line {row.line} cannot be read: {row.error}")

    def _refuse_bad_rows(self, plan: Plan, results: Results) -> None:
        for _, row in plan.bad_rows():
            if not results.done(row.line):
                assert row.error is not None
                raw = self.job.source.read(row.offset, row.length)
                self._fail(results, row.line, raw, row.error, {})

    def _fail(
        self, results: Results, line: int, raw: bytes | None, error: RowError, stats: dict[str, object],
        had: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        payload = self.writer.failure(line, raw, error, had)
        noted = {**stats, "code": error.code, "message": str(error)[:500]}
        results.put(line, row_key(self.job.manifest, raw or b""), "failed", payload, noted)

    # -- the engine --------------------------------------------------------------------------------

    def _start(
        self, plan: Plan, loading: Callable[[], None] = lambda: None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        if not isinstance(self.job.words, ServedWords):
            return self.engines.start(*self._needs(self.job.words, plan), loading, meanwhile)
        assert isinstance(self.engines, Engines)  # servers are as one engine, however many they are
        self.engines.reach(self.job)

    def _needs(self, words: Words, plan: Plan) -> tuple[EngineConfig, int]:
        """What an engine is told, and the tokens that a plan can fill its memory with."""
        config = replace(self.job.options.engine(), model=str(words.folder))
        return config, plan.bound + min(plan.answer_tokens, config.max_sequences * words.info.context)

    def _revive(self, plan: Plan, feed: Feed, results: Results, death: EngineDied) -> None:
        """Start another engine in place of a dead one, and give up on a row that has killed it twice alone."""
        if not self.engines.bury(death):
            return
        for line in results.died(feed.died(death.engine)):
            error = RowError("the engine died twice while it ran this row alone", "engine_died")
            self._take_row(results, feed.fail(line, error))

        def meanwhile() -> None:
            self._pass_time(feed, results)

        assert isinstance(self.job.words, Words)
        self.engines.revive(death.engine, *self._needs(self.job.words, plan), meanwhile)

    # -- the loop ----------------------------------------------------------------------------------

    def _recall(self, feed: Feed, results: Results) -> None:
        """End what need not be computed."""
        for rows in self.reuse.recall():
            for ended in rows:
                self._take_row(results, ended)
                while self.reuse.copies.waiting and not self.stop.asked:
                    self._pass_time(feed, results)
            self._pass_time(feed, results)
            if self.stop.asked or self.budget_hit:
                return
        if self.reuse.recalled:
            self.display.note(f"cache   {self.reuse.recalled:,} rows were answered by earlier jobs")

    def _verify(self, plan: Plan, results: Results) -> bool:
        """Compute a sample of the rows again and compare. False when there was no time to."""
        lines = choose(results.journal, self.job.options.verify)
        self.check = Check(results.journal, lines)
        self.meter.verifying()
        feed = self._feed(plan, results)
        feed.follow(self.check.units(plan))
        if lines and not self.engines.ready:
            self._start(plan)
        if lines:
            self._loop(feed, results)
        return self.check.rows == len(lines)

    def _loop(self, feed: Feed, results: Results) -> None:
        plan = feed.plan
        while not self.stop.asked and not self.budget_hit:
            try:
                if self.job.options.order is not Order.FINISH:
                    feed.hurry(results.status().written)
                for engine in range(self.engines.number):
                    requests, watched = feed.next(self.clock.now(), engine)
                    if requests:
                        self.engines.submit(engine, self.blamed.marked(requests), watched)
                while feed.ready:
                    self._take_row(results, feed.ready.pop())
                waiting = self.reuse.copies.waiting
                if feed.over and not waiting:
                    break
                news = self.engines.outputs(0.0 if waiting else POLL)
                if news is not None:
                    self._take(news, feed, results)
                elif said := self.engines.silent():
                    self.display.warn(said)
            except EngineDied as death:
                self._revive(plan, feed, results, death)
            self._pass_time(feed, results)
            if self.check is None:  # what is compared may take its time
                self._cancel_late(feed)
        if self.stop.asked and self.engines.ready:
            for _ in range(self.engines.number):
                try:
                    if (news := self.engines.outputs(LAST_STEP)) is None:
                        return
                    self._take(news, feed, results)
                except EngineDied:
                    return  # its unfinished rows would have run again anyway

    def _cancel_late(self, feed: Feed) -> None:
        """Ask the engine to end what has run for longer than its row allows; it comes back with what it had."""
        late = feed.late(self.clock.now())
        try:
            if late:
                self.engines.cancel(late)
        except EngineDied:
            pass  # the next look for news finds it so too: one engine by its pipe, several remember it

    def _pass_time(self, feed: Feed, results: Results) -> None:
        """End some of the rows that are like another, and whatever is done by the clock."""
        for ended in self.reuse.copies.make():
            self._put(results, ended)
        now = self.clock.now()
        results.tick(now)
        if self.cache is not None:
            self.cache.tick(now)
            if said := self.cache.complaint():
                self.display.warn(said)
        progress = self._progress(feed, results)
        self.meter.tick(now, results, feed, progress)
        self.display.show(progress)

    def _take(self, news: News, feed: Feed, results: Results) -> None:
        for said in news.warnings:
            self.display.warn(said)
        feed.started(news.started, self.clock.now(), news.again)
        self.blamed.add(news.blamed)
        cancel: list[str] = []
        for output in news.outputs:
            ended, stopped = feed.take(output)
            cancel += stopped
            if ended is not None:
                self.engines.answered(news.engine)
                self.meter.shares.completed(news.engine)
                self._take_row(results, ended)
        if cancel:
            self.engines.cancel(cancel)
        self.meter.take(news, self.job.state.path)

    def _take_row(self, results: Results, ended: Ended) -> None:
        if self.check is not None:
            return self._compare(self.check, ended)
        for one in self.reuse.add(ended, self.clock.now()):
            self._put(results, one)

    def _compare(self, check: Check, ended: Ended) -> None:
        """A row has run again: is it what was answered?"""
        again = self.writer.answer(ended.spec, ended.answers) if ended.error is None else str(ended.error).encode()
        if not check.compare(ended.line, again):
            self.display.warn(f"line {ended.line} was computed again and is NOT what was answered")
            if self.cache is not None:
                forget(ended, self.cache)

    def _put(self, results: Results, ended: Ended) -> None:
        self.meter.ended(ended.row, ended.stats)
        if ended.error is not None:
            self._fail(results, ended.line, ended.raw, ended.error, ended.stats, ended.had)
        else:
            self._greet(ended.spec.body.model)
            payload = self.writer.answer(ended.spec, ended.answers)
            key = row_key(self.job.manifest, ended.raw or b"")
            results.put(ended.line, key, "ok", payload, ended.stats)
        self._check_budget(results)

    def _greet(self, name: str | None) -> None:
        """Say once that rows may name any model, and which one answers them."""
        known = (None, self.job.name, *self.job.options.adapter)
        if name not in known and not self.strangers and not self.job.options.endpoints:
            self.strangers = True
            self.display.warn(f"rows name the model {name!r}; {self.job.name} answers all (--strict refuses them)")

    def _check_budget(self, results: Results) -> None:
        status = results.status()
        self.budget_hit = self.job.options.max_failures.exceeded(status.counts["failed"], status.total)

    def _progress(self, feed: Feed, results: Results) -> Progress:
        status = results.status()
        return self.meter.progress(
            feed, status.total, status.answered, status.counts["failed"], status.written, status.waiting_for,
            self.reuse.copies.left, self.clock.now(),
        )  # fmt: skip

    # -- the end -----------------------------------------------------------------------------------

    def _end(self, results: Results, last: Progress, finished: bool) -> int:
        status = results.status()
        code = judge(self.job.options, status.counts["failed"], status.total)
        if not finished and code != BUDGET_HIT:
            code = INTERRUPTED if self.stop.asked else BUDGET_HIT
        self.engines.close()
        results.keep()  # the report counts what the journal has
        if self.cache is not None and self.cache.damaged:
            self.display.warn(f"{self.cache.damaged:,} damaged answers of the cache were removed, and not used")
        report = self.meter.report(self.job, results, last, finished, code, self.check)
        write_report(report, self.job.state.path, self.files)
        if finished:
            self.job.state.finish(report.status)
        if not self.job.options.quiet:
            print_report(report, self.console)
        return report.status
