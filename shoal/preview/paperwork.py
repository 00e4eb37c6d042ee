"""What a job's own process does beside the engine, timed on the first rows of the very file: a run's own code.

It must not know engines or what steps cost. Answers are pretended; of the disk only the processor's time is counted.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.core.types import Answer, Finish, Output, Request
from shoal.jobs.answer import AnswerWriter
from shoal.jobs.feed import Feed
from shoal.jobs.files import DiskFiles
from shoal.jobs.part import parts_of
from shoal.jobs.results import Results, open_results
from shoal.jobs.stop import WallClock
from shoal.preview.look import Looked

TOKENS = 64  # of a long pretended answer; the others have one
FEW = 256  # requests that are tried


@dataclass(frozen=True, slots=True)
class Paperwork:
    """Seconds of one core."""

    request: float  # to make it of its row, hand it over, and to write and keep its answer
    token: float  # of its answer
    drawn: float  # share of the requests whose tokens are drawn, not the likeliest

    def seconds(self, requests: int, tokens: int) -> float:
        """For a whole job."""
        return self.request * requests + self.token * tokens


def measure(looked: Looked) -> Paperwork:
    """Hand out the first requests, answer every other one with many tokens, and keep the answers."""
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
        try:
            short = _take(feed, writer, results, handed[::2], 1, vector)
            long = _take(feed, writer, results, handed[1::2], TOKENS, vector)
        finally:
            results.close()
    token = max(long - short, 0.0) / (TOKENS - 1) if len(handed) > 1 else 0.0
    return Paperwork(opening + max(short - token, 0.0), token, drawn)


def _take(
    feed: Feed, writer: AnswerWriter, results: Results, requests: list[Request], tokens: int, vector: list[float]
) -> float:
    """Seconds to take and keep the answer of one of the requests: so many tokens, or the vector."""
    timing = {"arrival": 0.0, "start": 0.0, "first": 0.0, "end": 0.0, "cached": 0.0, "preemptions": 0.0}
    began = time.thread_time()
    for request in requests:
        feed.started((request.id,), 0.0)
        answer = (request.prompt * -(-tokens // len(request.prompt)))[:tokens].tolist()
        output = Output(request.id, answer, Finish.LENGTH, timing=timing)
        if request.answer is Answer.VECTOR:
            output = Output(request.id, finish=Finish.LENGTH, vector=vector, timing=timing)
        ended, _ = feed.take(pickle.loads(pickle.dumps(output)))
        if ended is not None and ended.error is None:
            results.put(ended.line, bytes(16), "ok", writer.answer(ended.spec, ended.answers), ended.stats)
            results.status()
    results.keep()
    return (time.thread_time() - began) / max(len(requests), 1)
