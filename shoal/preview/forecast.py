"""How long a planned job will take: the real scheduler in pretend time, or its steps in bulk where that is too slow.

It knows the plan and what steps cost; it must not know texts, files, or a true length that nobody gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from shoal.core.clock import SimClock
from shoal.core.config import EngineConfig
from shoal.core.types import Answer, Request, Sampling, Step
from shoal.engine import Engine
from shoal.jobs.plan_sort import Ints
from shoal.jobs.supply import WINDOW
from shoal.preview.bulk import Time, Work, in_bulk
from shoal.preview.look import Served
from shoal.sched.cost import MeasuredCost
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import END, SimExecutor

SIMULATED = 100_000  # row-steps, prompt steps among them, up to which the scheduler itself is asked: a few seconds


def work_of(looked: Served, answers: Ints) -> Work:
    """The work of a job; `answers` are tokens by unit."""
    order = looked.order
    samples = looked.units["samples"].astype(np.int64)[order]
    length = looked.units["length"].astype(np.int64)[order]
    first = np.cumsum(samples) - samples
    found = np.repeat(np.maximum(length - 1, 0), samples)  # what later samples find is the whole prompt
    found[first] = np.minimum(length - looked.cost, np.maximum(length - 1, 0))
    scored = np.zeros(len(found), dtype=np.int64)
    reach = looked.units["reach"].astype(np.int64)[order]
    scored[first] = np.where(reach >= 0, np.maximum(length - 1 - reach, 0), 0)
    return Work(np.repeat(length, samples), found, np.repeat(answers[order], samples), scored)


class _Priced:
    """A cost model that keeps account of what steps go to."""

    def __init__(self, cost: MeasuredCost) -> None:
        self.cost, self.least = cost, cost.parts(1, 1, 0, 0)
        self.time = Time(by="the scheduler itself, in pretend time")

    def seconds(self, step: Step) -> float:
        """As the model has it."""
        parts = self.cost.step_parts(step)
        self.time.add(parts, self.least, 1, step.num_tokens)
        return sum(parts)


def simulate(looked: Served, answers: Ints, cost: MeasuredCost, config: EngineConfig, blocks: int) -> Time:
    """The real scheduler over the whole plan, fed as a job feeds it; answers that may end anywhere are a surprise."""
    clock, priced = SimClock(), _Priced(cost)
    scheduler = Scheduler(BatchPolicy(Budget(config.step_tokens, config.max_sequences)), blocks, config.block_size)
    samples = looked.units["samples"].tolist()
    lengths = {
        f"{position}.{sample}": int(answers[number])
        for position, number in enumerate(looked.order.tolist())
        if answers[number] < looked.limits[number]
        for sample in range(samples[number])
    }
    engine = Engine(scheduler, SimExecutor(clock, priced, lengths), clock, int(config.overlap))
    requests = _requests(looked)
    exhausted = False
    while not exhausted or engine.busy:
        if not exhausted and len(scheduler.waiting) <= WINDOW // 2:
            some = list(islice(requests, WINDOW - len(scheduler.waiting)))
            exhausted = not some
            for request in some:
                engine.add(request)
        before = priced.time.seconds
        engine.step()
        priced.time.peak = max(priced.time.peak, scheduler.kv.in_use)
        seats = bool(scheduler.waiting) and len(scheduler.running) < config.max_sequences
        room = engine.last is not None and engine.last.num_tokens < config.step_tokens
        if seats and room and 2 * scheduler.kv.in_use > blocks:  # nothing but memory keeps the next one out
            priced.time.waited += priced.time.seconds - before
    priced.time.prompt = scheduler.counters.prompt_computed
    return priced.time


def _requests(looked: Served) -> Iterator[Request]:
    units, limits = looked.units, looked.limits
    vector = (limits == 0) & (units["goal"] == units["length"])  # nothing is sampled, and all is computed
    score_from = np.where(~vector & (units["reach"] >= 0), units["reach"] + 1, -1)
    for unit, number in zip(looked.plan.units_from(), looked.order.tolist(), strict=True):
        limit, certain = int(limits[number]), bool(looked.certain[number])
        for sample in range(unit.samples):
            yield Request(
                id=f"{unit.position}.{sample}", prompt=unit.tokens,
                sampling=Sampling(max_tokens=limit, stop=frozenset() if certain else frozenset((END,))),
                answer=Answer.VECTOR if vector[number] else Answer.TOKENS,
                score_from=-1 if sample else int(score_from[number]), salt=str(units["root"][number]),
                index=unit.index + sample, future=unit.futures[sample] if unit.futures is not None else None,
            )  # fmt: skip


def predict(
    looked: Served, answers: Ints, cost: MeasuredCost, config: EngineConfig, blocks: int,
    simulated: int = SIMULATED, walked: int | None = None,
) -> Time:  # fmt: skip
    """The time of a job whose answers have these lengths: by the scheduler itself up to `simulated` row-steps, else in
    bulk; of more than `walked` prompts, by one in so many."""
    work = work_of(looked, answers)
    if work.row_steps <= simulated and looked.plan.num_units == len(looked.order):
        return simulate(looked, answers, cost, config, blocks)
    every = 1 if walked is None else -(-len(work) // walked)
    time = in_bulk(work.thin(every), cost, config, blocks)
    return time if every <= 1 else time.times(every)
