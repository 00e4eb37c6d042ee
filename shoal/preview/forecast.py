"""How long a planned job will take: the real scheduler in pretend time, or its steps in bulk where that is too slow.

It knows the plan and what steps cost; it must not know texts, files, or a true length that nobody gave it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

import numpy as np

from shoal.core.clock import SimClock
from shoal.core.config import EngineConfig
from shoal.core.types import Answer, Request, Sampling, Step
from shoal.engine import Engine
from shoal.jobs.feed import WINDOW
from shoal.jobs.plan_sort import Ints
from shoal.preview.look import Looked
from shoal.sched.cost import MeasuredCost, Parts
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler
from shoal.sim.executor import END, SimExecutor

SIMULATED = 100_000  # row-steps, prompt steps among them, up to which the scheduler itself is asked: a few seconds


@dataclass(slots=True)
class Time:
    """Predicted seconds of all steps, by what they go to."""

    seconds: float = 0.0
    steps: float = 0.0
    weights: float = 0.0  # reading the layers' and the head's weights, whatever is computed with them: bandwidth
    compute: float = 0.0  # what products take beyond that, and all that goes with the number of tokens
    attention: float = 0.0
    waited: float = 0.0  # seconds in which rows wait because memory is full
    prompt: float = 0.0  # prompt tokens computed
    by: str = "steps in bulk"  # how it was found

    def add(self, parts: Parts, least: Parts, times: float) -> None:
        """Take `times` steps; `least` is a step of one token, that reads the weights for little else."""
        total = sum(parts) * times
        fixed = min(least.layers + least.answers, parts.layers + parts.answers) * times
        self.seconds += total
        self.steps += times
        self.weights += fixed
        self.compute += (parts.layers + parts.answers) * times - fixed
        self.attention += parts.attention * times


@dataclass(frozen=True, slots=True)
class Work:
    """Requests in serving order: all that their time depends on, if answers end where `answers` says."""

    prompts: Ints  # tokens
    found: Ints  # of them, there when its turn comes
    answers: Ints

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def row_steps(self) -> int:
        """Work of a simulation that follows every row."""
        return int(self.answers.sum()) + len(self.prompts)


def work_of(looked: Looked, answers: Ints) -> Work:
    """The work of a job; `answers` are tokens by unit."""
    order = looked.order
    samples = looked.units["samples"].astype(np.int64)[order]
    length = looked.units["length"].astype(np.int64)[order]
    first = np.cumsum(samples) - samples
    found = np.repeat(np.maximum(length - 1, 0), samples)  # what later samples find is the whole prompt
    found[first] = np.minimum(length - looked.cost, np.maximum(length - 1, 0))
    return Work(np.repeat(length, samples), found, np.repeat(answers[order], samples))


def in_bulk(work: Work, cost: MeasuredCost, config: EngineConfig, blocks: int) -> Time:
    """Steps as the batch policy makes them, many alike at once: rows in order, as many as fit memory to their end."""
    return _Bulk(work, cost, config, blocks).run()


class _Bulk:
    """One walk over a job's steps. Rows that decode are kept by the step in which they end."""

    def __init__(self, work: Work, cost: MeasuredCost, config: EngineConfig, blocks: int) -> None:
        self.cost, self.least = cost, cost.parts(1, 1, 0, 0)
        self.budget, self.sequences, self.size = config.step_tokens, config.max_sequences, config.block_size
        self.free = blocks * self.size
        self.time = Time()
        found = work.found - work.found % self.size  # a block that is shared in part is copied, and its own
        need = work.prompts + work.answers - found + self.size  # as the policy's forecast has it: see MemoryForecast
        columns = (work.prompts, work.found, work.answers, np.minimum(need, self.free))
        self.rows: Iterator[tuple[int, int, int, int]] = zip(*(column.tolist() for column in columns), strict=True)
        self.next = next(self.rows, None)
        self.step = self.decoding = self.running = 0
        self.context = self.own = 0.0  # positions that decoding rows look at, and those that are theirs alone
        self.ends: list[tuple[int, int, float, float]] = []  # (step, memory, context, own) of decoding rows
        self.prompts: deque[list[int]] = deque()  # [start, end, tokens of answer, memory, found] being computed
        self.backlog = self.starts = 0

    def run(self) -> Time:
        """All steps."""
        while self.next is not None or self.running:
            full = self._admit()
            before = self.time.seconds
            if self.prompts:
                self._step()
            else:
                self._jump()
            if full:
                self.time.waited += self.time.seconds - before
        return self.time

    def _admit(self) -> bool:
        """Let rows in while a step has room for their prompts; whether memory stopped that."""
        room = self.budget - self.decoding
        while self.next is not None and self.running < self.sequences and self.backlog < room:
            length, found, answer, need = self.next
            if need > self.free and self.running:
                return True
            self.free -= need
            self.running += 1
            self.starts += 1
            self.backlog += length - found
            self.prompts.append([found, length, answer, need, found])
            self.next = next(self.rows, None)
        return False

    def _step(self) -> None:
        """One step that computes prompts beside decodes."""
        room = max(self.budget - self.decoding, 1)
        tokens, rows, pairs, read = self.decoding, self.decoding, self.context, self.own
        done = []
        while self.prompts and room > 0:
            part = self.prompts[0]
            count = min(part[1] - part[0], room)
            pairs += count * (part[0] + (count + 1) / 2)
            room -= count
            tokens += count
            part[0] += count
            self.backlog -= count
            self.time.prompt += count
            if part[0] < part[1]:
                break
            done.append(self.prompts.popleft())
        read += sum(part[1] - part[4] for part in done)
        self.time.add(self.cost.parts(tokens, rows + len(done), pairs, read, self.starts), self.least, 1)
        self.starts = 0
        self._passed(1)
        for _, length, answer, need, found in done:
            if answer <= 1:
                self.free += need
                self.running -= 1
                continue
            self.decoding += 1
            self.context += length
            self.own += length - found
            heappush(self.ends, (self.step + answer - 1, need, length - self.step, length - found - self.step))

    def _jump(self) -> None:
        """All steps until the next row ends: they differ in nothing but the answers' growth."""
        steps = max(self.ends[0][0] - self.step, 1)
        grown = self.decoding * (steps - 1) / 2
        parts = self.cost.parts(self.decoding, self.decoding, self.context + grown, self.own + grown)
        self.time.add(parts, self.least, steps)
        self._passed(steps)

    def _passed(self, steps: int) -> None:
        self.step += steps
        self.context += self.decoding * steps
        self.own += self.decoding * steps
        while self.ends and self.ends[0][0] <= self.step:
            _, need, context, own = heappop(self.ends)
            self.decoding -= 1
            self.running -= 1
            self.free += need
            self.context -= context + self.step
            self.own -= own + self.step


class _Priced:
    """A cost model that keeps account of what steps go to."""

    def __init__(self, cost: MeasuredCost) -> None:
        self.cost, self.time, self.least = (
            cost,
            Time(by="the scheduler itself, in pretend time"),
            cost.parts(1, 1, 0, 0),
        )

    def seconds(self, step: Step) -> float:
        """As the model has it."""
        parts = self.cost.step_parts(step)
        self.time.add(parts, self.least, 1)
        return sum(parts)


def simulate(looked: Looked, answers: Ints, cost: MeasuredCost, config: EngineConfig, blocks: int) -> Time:
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
        seats = bool(scheduler.waiting) and len(scheduler.running) < config.max_sequences
        room = engine.last is not None and engine.last.num_tokens < config.step_tokens
        if seats and room and 2 * scheduler.kv.in_use > blocks:  # nothing but memory keeps the next one out
            priced.time.waited += priced.time.seconds - before
    priced.time.prompt = scheduler.counters.prompt_computed
    return priced.time


def _requests(looked: Looked) -> Iterator[Request]:
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


def predict(looked: Looked, answers: Ints, cost: MeasuredCost, config: EngineConfig, blocks: int) -> Time:
    """The time of a job whose answers have these lengths, by the scheduler itself where it is small."""
    work = work_of(looked, answers)
    if work.row_steps <= SIMULATED:
        return simulate(looked, answers, cost, config, blocks)
    return in_bulk(work, cost, config, blocks)
