"""What a job's own process does beside the engine, timed on the first rows of the very file: a run's own code.

It must not know engines or what steps cost. Answers are pretended; of the disk only the processor's time is counted.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

from shoal.client import News, StepRecord
from shoal.core.types import Answer, Finish, Output, Request
from shoal.jobs.answer import AnswerWriter
from shoal.jobs.feed import Feed
from shoal.jobs.files import DiskFiles
from shoal.jobs.meter import COUNTED, Meter
from shoal.jobs.part import parts_of
from shoal.jobs.results import Results, open_results
from shoal.jobs.stop import WallClock
from shoal.preview.look import Looked

TOKENS = 64  # of a long pretended answer; the others have one
FEW = 256  # requests that are tried
MESSAGES = 64


@dataclass(frozen=True, slots=True)
class Paperwork:
    """Seconds of one core."""

    request: float  # to make it of its row, hand it over, and to write and keep its answer
    token: float  # of its answer
    news: float  # of a message from the engine, whatever is in it
    opening: float = 0.0  # of `request`, what comes before the engine has it
    drawn: float = 0.0  # share of the requests whose tokens are drawn, not the likeliest

    def seconds(self, requests: float, tokens: float, steps: float) -> float:
        """For a whole job of so many steps: there is a message when a request starts or ends, at most one a step."""
        return self.request * requests + self.token * tokens + self.news * min(steps, 2 * requests)


def measure(looked: Looked) -> Paperwork:
    """Hand out the first requests, answer every other one with many tokens, keep the answers, and hear some News."""
    words = looked.words
    feed = Feed(looked.plan, looked.source, words.encoder, parts_of(words.tokenizer), lambda line: False)
    writer = words.writer("0" * 64, False)
    vector = [1.0] * (len(words.info.head.labels) if words.info.head is not None else words.info.vector)
    began = time.thread_time()
    requests, _ = feed.next(0.0)
    made = time.thread_time()
    handed = pickle.loads(pickle.dumps(requests[:FEW]))
    opening = (made - began) / max(len(requests), 1) + (time.thread_time() - made) / max(len(handed), 1)
    drawn = sum(not request.sampling.greedy for request in requests) / max(len(requests), 1)
    with tempfile.TemporaryDirectory(prefix="shoal-") as name:
        out, lines = Path(name) / "out.jsonl", range(1, looked.plan.num_lines + 1)
        results = open_results(Path(name), out, None, lines, "finish", DiskFiles(), WallClock())
        desk = _Desk(feed, writer, results, Path(name), vector)
        try:
            desk.take(handed[:1], 1)  # what is slow once
            short = desk.take(handed[1::2], 1)
            long = desk.take(handed[2::2], TOKENS)
            news = desk.hear(MESSAGES)
        finally:
            results.close()
            desk.close()
    token = max(long - short, 0.0) / (TOKENS - 1) if len(handed) > 2 else 0.0
    return Paperwork(opening + max(short - token, 0.0), token, news, opening, drawn)


class _Desk:
    """Where answers are taken and kept, as a run does it."""

    def __init__(self, feed: Feed, writer: AnswerWriter, results: Results, folder: Path, vector: list[float]) -> None:
        """`vector` is the answer of requests that want one."""
        self._feed, self._writer, self._results, self._folder = feed, writer, results, folder
        self._vector = vector
        self._meter = Meter(time.monotonic())
        self._here, self._there = Pipe()

    def close(self) -> None:
        """Close what was opened."""
        self._meter.close()
        self._here.close()
        self._there.close()

    def take(self, requests: list[Request], tokens: int) -> float:
        """Seconds to take and keep the answer of one of the requests, beside what its News takes."""
        timing = {"arrival": 0.0, "start": 0.0, "first": 0.0, "end": 0.0, "cached": 0.0, "preemptions": 0.0}
        began = time.thread_time()
        for request in requests:
            self._feed.started((request.id,), 0.0)
            answer = (request.prompt * -(-tokens // len(request.prompt)))[:tokens].tolist()
            output = Output(request.id, answer, Finish.LENGTH, timing=timing)
            if request.answer is Answer.VECTOR:
                output = Output(request.id, finish=Finish.LENGTH, vector=self._vector, timing=timing)
            ended, _ = self._feed.take(pickle.loads(pickle.dumps(output)))
            if ended is not None and ended.error is None:
                payload = self._writer.answer(ended.spec, ended.answers)
                self._results.put(ended.line, bytes(16), "ok", payload, ended.stats)
                self._results.status()
        self._results.keep()
        return (time.thread_time() - began) / max(len(requests), 1)

    def hear(self, times: int) -> float:
        """Seconds of a News that says nothing of any request: sent, received, noted."""
        counters = dict.fromkeys(COUNTED, 1)
        began = time.thread_time()
        for number in range(times):
            self._there.send(News(steps=(StepRecord(number, 1, 1, 1, 1, 0.0),), counters=counters))
            if self._here.poll(1.0):
                self._meter.take(self._here.recv(), self._folder)
            status = self._results.status()
            self._meter.progress(self._feed, status.total, status.answered, 0, 0, None, 0, 0.0)
            self._results.tick(0.0)
        return (time.thread_time() - began) / times
