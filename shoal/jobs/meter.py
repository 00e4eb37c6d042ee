"""What a job costs: time, processor seconds, memory, tokens; for the display while it runs, for the report at the end.

It must not decide anything. Numbers of earlier runs of the job are kept in the journal and added.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]

from shoal import __version__
from shoal.client import News, Ready
from shoal.jobs.display import PlanFacts, Progress, Window
from shoal.jobs.feed import Feed
from shoal.jobs.files import disk_errors
from shoal.jobs.foretold import Course, Foretold, Seer, attempt
from shoal.jobs.outlook import Outlook
from shoal.jobs.plan import Plan
from shoal.jobs.prepare import Prepared
from shoal.jobs.pulse import LONGEST, Recorder
from shoal.jobs.report import Report, Rows, Tokens, Verified
from shoal.jobs.results import Results
from shoal.jobs.shares import Shares
from shoal.jobs.tally import FACTS, SPENT, tally
from shoal.jobs.verify import Check

LOOK_EVERY = 0.5  # seconds between looks at the processes' memory
NOTE_EVERY = 1.0  # seconds between notes of what was spent and how things stand, which the next commit keeps
SAVE_EVERY = 5.0  # seconds after which notes are kept though no row has ended
STEPS = "steps.jsonl"
LONG, TIMES = 10.0, 4  # a row that runs longer than so many seconds, and so many times the mean, is named
LIBRARIES = ("torch", "tokenizers", "numpy")
COUNTED = (
    "steps", "prompt_computed", "prompt_last", "prompt_preempted", "output_computed", "output_preempted",
    "preemptions", "cached", "requests", "refused", "broken",
)  # fmt: skip


class Meter:
    """The numbers of one run. Changed by the job's loop alone."""

    def __init__(self, began: float) -> None:
        """`began` [s, monotonic]: when the run did."""
        self.began = began
        self.plan_seconds = self.load_seconds = 0.0
        self._ready: dict[int, Ready] = {}  # by engine, as all that follows with an engine's number
        self.restarts = 0
        self._earlier: dict[str, float] = {}  # of earlier runs
        self._dead: dict[str, int] = dict.fromkeys(COUNTED, 0)  # of engines of this run that died
        self._counters: dict[int, Mapping[str, int]] = {}  # of the engines that live
        self._used: dict[int, int] = {}  # bytes of keys and values in use
        self._requests: dict[int, tuple[int, int]] = {}  # waiting and running
        self._peak = 0
        self._looked = self._noted = -math.inf  # on the job's clock
        self._saved: float | None = None
        self._self, self._processes = psutil.Process(), dict[int, psutil.Process]()
        self.shares = Shares()
        self._steps: IO[str] | None = None
        self._facts = Report(Rows())
        self._bound = 0  # prompt tokens to compute
        self.outlook: Outlook | None = None
        self._peak_kv = 0  # bytes
        self._in_flight: dict[int, int] = {}  # tokens that are counted, and not computed yet
        self._ended = self._ended_tokens = 0  # rows of this run, and the output tokens they came to
        self._ended_seconds, self._looped = 0.0, 0  # for which they ran; rows of them that repeat themselves
        self._answered: dict[str, int] | None = None  # counters when all rows had ended
        self._recorder, self._window = Recorder(), Window()

    # -- what happens ------------------------------------------------------------------------------

    def planned(self, plan: Plan) -> None:
        """The plan is made."""
        self.plan_seconds = time.monotonic() - self.began

    def note(self, job: Prepared, plan: Plan, results: Results) -> None:
        """Note what is known of the rows to be answered, before any is computed."""
        served = job.options.servers  # by whom tokens are counted as they come; the plan's are units of text
        self._bound = 0 if served else plan.bound
        earlier = results.journal.meta(FACTS)
        facts = Report(
            rows=Rows(results.status().total), endpoints=list(served),
            tokens=Tokens() if served else Tokens(plan.prompt_tokens, plan.bound),
            versions={"shoal": __version__, **{name: version(name) for name in LIBRARIES}},
            manifest=job.manifest.hash, plan=plan.hash,
            model=job.name, weights=job.manifest.weight_mode, kv=job.manifest.kv_mode,
            input=str(job.options.input), output=str(job.options.output), finished=False,
            predicted=msgspec.json.decode(earlier, type=Report).predicted if earlier else None,
        )  # fmt: skip
        self._keep(facts, results)

    def foretelling(self, seer: Seer | None, job: Prepared, plan: Plan, results: Results) -> Callable[[], None]:
        """What asks, while the engine takes its memory, what the rows to be computed will take."""
        if seer is None:
            return lambda: None
        free = attempt(seer.free)
        return lambda: self._foretell(seer, job, plan, results, free)

    def _foretell(self, seer: Seer, job: Prepared, plan: Plan, results: Results, free: int | str) -> None:
        """What was said when the job began stays; what is said of the rest of a job is not said of the job."""
        wanted = ~results.journal.ended(plan.lines)
        some = None if wanted.all() else wanted
        if isinstance(free, str):
            course: Course | None | str = free
        else:
            course = attempt(lambda: seer.foretell(job, plan, some, self.plan_seconds, free))
        if course is None:
            return
        computed = np.unique(plan.units["row"])  # others are copies, known to the cache, or bad
        ended = int((~wanted[computed]).sum())
        if not isinstance(course, str):
            self.outlook = Outlook(course, len(computed), ended)
        if self._facts.predicted is None and not ended:
            said = Foretold(why=course) if isinstance(course, str) else course.said
            self._keep(replace(self._facts, predicted=said), results)

    def begin(self, now: float) -> None:
        """The engine is ready and begins."""
        if self.outlook is not None:
            self.outlook.begin(now, self._earlier.get("wall", 0.0) + time.monotonic() - self.began)

    def _keep(self, facts: Report, results: Results) -> None:
        self._facts, text = facts, msgspec.json.encode(facts).decode()
        if results.journal.meta(FACTS) != text:
            results.journal.set_meta(FACTS, text)

    def _keep_foretold(self, results: Results) -> None:
        """What is said on the way stays with what was said before."""
        said, outlook = self._facts.predicted, self.outlook
        if said is None or outlook is None:
            return
        found = replace(said, why=said.why or outlook.why)
        if said.soon is None:
            found = replace(found, soon=outlook.soon, soon_span=outlook.soon_span)
        if found != said:
            self._keep(replace(self._facts, predicted=found), results)

    def plan_facts(self, job: Prepared, plan: Plan, resumed: int) -> PlanFacts:
        """What there is to say before any model work; `resumed` rows were answered by an earlier run."""
        options, ready = job.options, list(self._ready.values())
        model = job.name + ("" if options.model else " (the embedded model)")
        device = ", ".join(sorted({one.device for one in ready})) or "a backend"
        device += f" with {len(ready)} engines" if len(ready) > 1 else ""
        if options.endpoints:
            model, device = options.model or "as the rows name it,", ", ".join(options.endpoints)
        elif job.vllm is not None:
            device = job.vllm.name
        return PlanFacts(
            input="standard input" if str(options.input) == "-" else str(options.input), model=model,
            rows=plan.num_rows, bad=plan.num_bad, copies=plan.num_copies,
            prompt_tokens=plan.prompt_tokens, prompt_bound=plan.bound,
            kv_bytes=self._kv_bytes, kv_tokens=sum(one.num_blocks * one.block_size for one in ready),
            seconds=self.plan_seconds, resumed=resumed, device=device,
            kv=job.manifest.kv_mode if ready else "", served=bool(options.servers),
        )  # fmt: skip

    def resume(self, results: Results) -> None:
        """Take over what earlier runs spent."""
        noted = results.journal.meta(SPENT)
        self._earlier = json.loads(noted) if noted else {}
        self._recorder.resume(results.journal, self._earlier.get("wall", 0.0))
        status = results.status()
        known = Progress(status.total, status.answered, status.counts["failed"], status.written, status.waiting_for)
        self._recorder.note(results.journal, known)
        results.keep()

    def loaded(self, ready: Ready, pid: int, engine: int = 0) -> None:
        """An engine is ready, in process `pid`."""
        if engine == 0:  # they load beside each other
            self.load_seconds += ready.load_seconds
        if engine not in self._ready or len(self._ready) == 1:  # with none of the others at work
            self._recorder.loaded(time.monotonic() - self.began)
        self._ready[engine] = ready
        self._processes[engine] = psutil.Process(pid)
        self.shares.device(engine, ready.device)

    def reached(self, seconds: float) -> None:
        """A server that was started for the job answers, after so many."""
        self.load_seconds += seconds
        self._recorder.loaded(time.monotonic() - self.began)

    def ended(self, row: int, stats: Mapping[str, object]) -> None:
        """A row of this run has ended; what it cost says how long the others will take."""
        self._looped += "loop_period" in stats
        if "copy_of" in stats or "cache" in stats:
            return  # it has cost nothing
        if self.outlook is not None:
            self.outlook.ended(row, stats)
        tokens = stats.get("completion_tokens", 0)
        assert isinstance(tokens, int)
        self._ended += 1
        self._ended_tokens += tokens
        if self._ended == 1:
            self._noted = -math.inf  # the commit that keeps the first row is to keep what it cost
        seconds = stats.get("run_seconds", 0.0)
        assert isinstance(seconds, float)
        self._ended_seconds += seconds

    def verifying(self) -> None:
        """All rows have ended: what is computed from here on is no part of the job."""
        self._answered = self._totals()
        self._recorder.checking = True
        self.shares.freeze()

    def died(self, engine: int = 0) -> None:
        """An engine is gone, and its counters with it."""
        counters = self._counters.pop(engine, {})
        self._dead = {name: number + counters.get(name, 0) for name, number in self._dead.items()}
        self.shares.died(engine)
        for of_engine in (self._processes, self._used, self._requests, self._in_flight):
            of_engine.pop(engine, None)
        self.restarts += 1
        self._recorder.died(len(self._ready) > 1)

    def take(self, news: News, folder: Path) -> None:
        """Read the engine's counters, and log its steps in the state folder."""
        if news.counters:
            engine, block = news.engine, self._block_bytes(news.engine)
            self._counters[engine], self._requests[engine] = news.counters, (news.waiting, news.running)
            self.shares.heard(engine, news.counters)
            most = max([news.used_blocks, *(step.used_blocks for step in news.steps)])
            self._peak_kv = max(self._peak_kv, sum(self._used.values()) - self._used.get(engine, 0) + most * block)
            self._used[engine] = news.used_blocks * block
            share = sum(self._used.values()) / max(self._kv_bytes, 1)
            totals = self.total("prompt_computed"), self.total("output_computed")
            waiting, running = (sum(numbers) for numbers in zip(*self._requests.values(), strict=True))
            self._recorder.hear(time.monotonic() - self.began, totals, share, waiting, running)
        if news.steps:
            self._in_flight[news.engine] = news.steps[-1].tokens
            with disk_errors(folder / STEPS):
                if self._steps is None:
                    self._steps = (folder / STEPS).open("a", encoding="utf-8")
                for step in news.steps:
                    several = {"engine": news.engine} if len(self._ready) > 1 else {}
                    self._steps.write(
                        json.dumps(
                            several
                            | {
                                "step": step.index, "tokens": step.tokens, "sequences": step.sequences,
                                "prompt_tokens": step.prompt_tokens, "used_blocks": step.used_blocks,
                                "ended": round(step.ended, 6),
                            }
                        ) + "\n"
                    )  # fmt: skip

    def tick(self, now: float, results: Results, feed: Feed, progress: Progress) -> None:
        """Look at the memory, and note what was spent and how things stand, when it is time to."""
        if now - self._looked > LOOK_EVERY:
            self._looked = now
            self._look()
        if now - self._noted > NOTE_EVERY:
            self._noted = now
            self.shares.apart = feed.lost_apart
            results.journal.note(SPENT, json.dumps(self._spent()))
            rates = self._window.add(now, progress)
            self._recorder.note(results.journal, progress, rates, feed.longest(now, LONGEST))
        self._keep_foretold(results)
        if self._saved is None or now - self._saved > SAVE_EVERY:
            if self._saved is not None:
                results.keep()
            self._saved = now

    def close(self) -> None:
        """Close the log of steps."""
        if self._steps is not None:
            with disk_errors(Path(self._steps.name)):
                self._steps.close()

    # -- what it came to ---------------------------------------------------------------------------

    def total(self, name: str) -> int:
        """A counter over all engines of this run."""
        return self._dead[name] + sum(counters.get(name, 0) for counters in self._counters.values())

    def _totals(self) -> dict[str, int]:
        return {name: self.total(name) for name in COUNTED}

    def progress(
        self, feed: Feed, rows: int, answered: int, failed: int, written: int, waiting_for: int | None, free: int,
        now: float,
    ) -> Progress:  # fmt: skip
        """The job at this moment; `free` of the rows to come cost nothing."""
        computed, output = self.total("prompt_computed"), self.total("output_computed")
        oldest = feed.straggler(now)
        slow = max(LONG, TIMES * self._ended_seconds / max(self._ended, 1))
        self.shares.apart = feed.lost_apart
        left = None
        if self.outlook is not None and self._answered is None:
            done = max(computed + output - sum(self._in_flight.values()), 0)
            left = self.outlook.left(now, done, output, lambda: feed.ages(now))
        return Progress(
            rows_total=rows, rows_done=answered, rows_failed=failed, rows_written=written, waiting_for=waiting_for,
            tokens_in=computed + self.total("cached"), tokens_out=output, tokens_saved=self.total("cached"),
            work_done=computed + output,
            work_left=self._work_left(max(self._bound - computed, 0), output, rows - answered - free),
            kv_used=sum(self._used.values()), kv_total=self._kv_bytes,
            looped=self._looped, straggler=oldest if oldest is not None and oldest.seconds > slow else None,
            seconds_left=left,
        )  # fmt: skip

    @property
    def _kv_bytes(self) -> int:
        return sum(one.kv_bytes for one in self._ready.values())

    def _block_bytes(self, engine: int) -> int:
        ready = self._ready.get(engine)
        return ready.kv_bytes // max(ready.num_blocks, 1) if ready else 0

    def _work_left(self, prompts: int, output: int, rows: int) -> int | None:
        """Tokens that `rows` will still cost: `prompts`, and answers as long as those that have ended were."""
        if not rows or not self._ended:
            return None if rows else 0
        under_way = max(output - self._ended_tokens, 0)
        return prompts + max(round(self._ended_tokens / self._ended * rows) - under_way, rows)

    def report(
        self, job: Prepared, results: Results, progress: Progress, finished: bool, code: int, check: Check | None
    ) -> Report:
        """The final report: rows from the journal, costs of this run and the earlier ones."""
        spent = self._spent()
        results.journal.note(SPENT, json.dumps(spent))
        self._keep_foretold(results)
        self._recorder.state = "ended"
        self._recorder.note(results.journal, progress)
        results.keep()
        found = tally(self._facts, results.journal.stats(), spent)
        lost = found.rows.total - found.rows.ok
        files = {str(job.options.output): found.rows.total if job.errors is None else found.rows.ok} if finished else {}
        if job.errors is not None and lost and finished:
            files[str(job.errors)] = lost
        verified = Verified(check.rows, check.differ) if check is not None else Verified()
        return replace(found, files=files, verified=verified, finished=finished, exit_code=code)

    def _spent(self) -> dict[str, float]:
        """All runs so far, this one included."""
        self._look()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.process_time() + children.ru_utime + children.ru_stime + self.engine_seconds()
        own = {name: float(count) for name, count in (self._answered or self._totals()).items()}
        own |= {
            "wall": time.monotonic() - self.began, "cpu": cpu, "load": self.load_seconds, "plan": self.plan_seconds,
            "restarts": float(self.restarts), "runs": 1.0,
        }  # fmt: skip
        own |= self.shares.spent()
        spent = self._earlier | {name: value + self._earlier.get(name, 0.0) for name, value in own.items()}
        spent["peak_kv"] = max(float(self._peak_kv), self._earlier.get("peak_kv", 0.0))
        spent["peak"] = max(float(self._peak), self._earlier.get("peak", 0.0))
        return spent

    def engine_seconds(self, engine: int | None = None) -> float:
        """Processor time of the engines that still live, or of one of them."""
        spent = 0.0
        for number, process in self._processes.items():
            if engine in (None, number):
                with suppress(psutil.Error):  # it has ended: its time is among that of the children
                    times = process.cpu_times()
                    spent += times.user + times.system
        return spent

    def _look(self) -> None:
        used = 0
        for process in (self._self, *self._processes.values()):
            with suppress(psutil.Error):  # it has ended
                used += process.memory_info().rss
        self._peak = max(self._peak, used)
