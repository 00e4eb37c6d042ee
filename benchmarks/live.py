"""Open-loop traffic on the real engine in this process, the same in pretend time, and the same again from a record.

It knows how to build, drive and time an engine; it must not know what is to be shown with it.
"""

from __future__ import annotations

import math
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal.build import BuiltEngine, WallClock
from shoal.core.clock import SimClock
from shoal.core.types import TOKEN, Finish, Output, Request, Sampling, Step
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.sched.cost import Cost
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import SimExecutor
from shoal.sim.replay import Record, Recorder, Replay, open_loop

LEAST_TOKEN = 300  # below are special ones
LIMIT = Budget(512, 64)


@dataclass(frozen=True, slots=True)
class Times:
    """What a run of some requests took, in seconds."""

    makespan: float  # from the first arrival to the last end
    first: tuple[float, ...]  # to the first token, by request in order
    record: Record | None = None

    def at(self, share: float) -> float:
        """A quantile of the time to the first token."""
        return float(np.quantile(self.first, share))


def traffic(seed: int, count: int, rate: float, vocabulary: int) -> list[Request]:
    """Requests by a Poisson process; prompts of 16 to 512 tokens (median 90) and answers of 4 to 96 (median 24) that
    nothing but their limit ends, none beginning as another does."""
    luck = random.Random(seed)
    found, when = [], 0.0
    for number in range(count):
        when += luck.expovariate(rate) if math.isfinite(rate) else 0.0
        length = min(512, max(16, round(luck.lognormvariate(math.log(90), 0.8))))
        answer = min(96, max(4, round(luck.lognormvariate(math.log(24), 0.7))))
        prompt = array(TOKEN, [luck.randrange(min(LEAST_TOKEN, vocabulary // 2), vocabulary) for _ in range(length)])
        found.append(Request(str(number), prompt, Sampling(max_tokens=answer), arrival=when, index=number))
    return found


def scheduler(built: BuiltEngine) -> Scheduler:
    """A scheduler such as every run here has: first come, first served, with the engine's own memory."""
    return Scheduler(Policy(LIMIT), built.facts.memory.num_blocks, built.facts.block_size)


def times(requests: Sequence[Request], news: Sequence[tuple[float, Output]], record: Record | None = None) -> Times:
    """What the news say. ValueError where a request did not get what it asked for."""
    first: dict[str, float] = {}
    got: dict[str, int] = {}
    for when, output in news:
        if output.finish not in {None, Finish.LENGTH}:
            raise ValueError(f"request {output.id} ended as {output.finish}: {output.error}")
        first.setdefault(output.id, when)
        got[output.id] = got.get(output.id, 0) + len(output.tokens)
    if got != {request.id: request.sampling.max_tokens for request in requests}:
        raise ValueError("not all requests got as many tokens as they asked for")
    span = max(when for when, _ in news) - requests[0].arrival
    return Times(span, tuple(first[request.id] - request.arrival for request in requests), record)


def real(built: BuiltEngine, requests: Sequence[Request]) -> tuple[Times, list[Request]]:
    """Run them on the model, by the wall clock, and record it. Also the requests with the arrivals they had."""
    clock = WallClock()
    settle_interpreter()  # as the engine process does
    recorder = Recorder(clock, built.runner)
    begin = clock.now() + 0.05
    placed = [replace(request, arrival=begin + request.arrival) for request in requests]
    engine = Engine(scheduler(built), recorder, recorder, ahead=1)
    news = open_loop(engine, placed, lambda until: time.sleep(max(0.0, until - clock.now())))
    return times(placed, news, recorder.record), placed


def pretended(built: BuiltEngine, requests: Sequence[Request], cost: Cost) -> Times:
    """The same in pretend time."""
    clock = SimClock()
    engine = Engine(scheduler(built), SimExecutor(clock, cost), clock, ahead=1)
    return times(requests, open_loop(engine, requests, clock.advance_to))


def repeated(built: BuiltEngine, placed: Sequence[Request], record: Record) -> list[Step]:
    """The plans of another scheduler of the same class that is told what the recorded one was."""
    replay = Replay(record)
    open_loop(Engine(scheduler(built), replay, replay, ahead=1), placed, lambda until: None)
    return replay.plans
