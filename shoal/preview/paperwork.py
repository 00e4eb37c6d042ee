"""What a job's own process does beside the engine, timed on the first rows of the very file: a run's own code.

It must not know engines or what steps cost. Answers are pretended; keeping them on the disk is not counted.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass

from shoal.core.types import Finish, Output, Request
from shoal.jobs.answer import AnswerWriter
from shoal.jobs.feed import Feed
from shoal.jobs.part import parts_of
from shoal.preview.look import Looked

TOKENS = 64  # of a long pretended answer; the others have one


@dataclass(frozen=True, slots=True)
class Paperwork:
    """Seconds of one core."""

    request: float  # to make it of its row, hand it over, and write its answer
    token: float  # of its answer
    drawn: float  # share of the requests whose tokens are drawn, not the likeliest

    def seconds(self, requests: int, tokens: int) -> float:
        """For a whole job."""
        return self.request * requests + self.token * tokens


def measure(looked: Looked) -> Paperwork:
    """Hand out the first requests, answer every other one with many tokens, and take the answers."""
    words = looked.words
    feed = Feed(looked.plan, looked.source, words.encoder, parts_of(words.tokenizer), lambda line: False)
    writer = AnswerWriter(words.tokenizer, "0" * 64, words.name, 0, False)
    began = time.perf_counter()
    requests, _ = feed.next(began)
    handed = pickle.loads(pickle.dumps(requests))
    opening = (time.perf_counter() - began) / max(len(requests), 1)
    short = _take(feed, writer, handed[::2], 1)
    long = _take(feed, writer, handed[1::2], TOKENS)
    token = max(long - short, 0.0) / (TOKENS - 1) if len(handed) > 1 else 0.0
    drawn = sum(not request.sampling.greedy for request in requests) / max(len(requests), 1)
    return Paperwork(opening + max(short - token, 0.0), token, drawn)


def _take(feed: Feed, writer: AnswerWriter, requests: list[Request], tokens: int) -> float:
    """Seconds to take the answer of one of the requests."""
    timing = {"arrival": 0.0, "start": 0.0, "first": 0.0, "end": 0.0, "cached": 0.0, "preemptions": 0.0}
    began = time.perf_counter()
    for request in requests:
        answer = (request.prompt * -(-tokens // len(request.prompt)))[:tokens].tolist()
        output = Output(request.id, answer, Finish.LENGTH, timing=timing)
        ended, _ = feed.take(pickle.loads(pickle.dumps(output)))
        if ended is not None and ended.error is None:
            writer.answer(ended.spec, ended.answers)
    return (time.perf_counter() - began) / max(len(requests), 1)
