"""Steps in bulk: a walk over a job's steps as the batch policy makes them, many alike at once.

It knows lengths in serving order and what steps cost; it must not know plans, texts, or a true length that nobody gave
it. The scheduler itself is asked where a job is small enough: see forecast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from shoal.core.config import EngineConfig
from shoal.jobs.plan_sort import Ints
from shoal.sched.cost import MeasuredCost, Parts

PART = 1 << 16  # rows looked at at once


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
    peak: float = 0.0  # blocks in use at once
    by: str = "steps in bulk"  # how it was found
    course: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])  # (tokens, seconds) so far

    def add(self, parts: Parts, least: Parts, times: float, tokens: float) -> None:
        """Take `times` steps of so many tokens; `least` is a step of one token, that reads the weights for little
        else."""
        total = sum(parts) * times
        fixed = min(least.layers + least.answers, parts.layers + parts.answers) * times
        self.seconds += total
        self.steps += times
        self.weights += fixed
        self.compute += (parts.layers + parts.answers) * times - fixed
        self.attention += parts.attention * times
        self.course.append((self.course[-1][0] + tokens * times, self.seconds))

    def times(self, factor: float) -> Time:
        """Of so many jobs like this one, one after the other."""
        counted = ("seconds", "steps", "weights", "compute", "attention", "waited", "prompt")
        course = [(factor * tokens, factor * seconds) for tokens, seconds in self.course]
        return replace(self, course=course, **{name: factor * getattr(self, name) for name in counted})


@dataclass(frozen=True, slots=True)
class Work:
    """Requests in serving order: all that their time depends on, if answers end where `answers` says."""

    prompts: Ints  # tokens
    found: Ints  # of them, there when its turn comes
    answers: Ints
    scored: Ints  # of the prompt's, those whose likelihood is wanted

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def row_steps(self) -> int:
        """Work of a simulation that follows every row."""
        return int(self.answers.sum()) + len(self.prompts)

    def thin(self, every: int) -> Work:
        """One in so many requests: a walk over them takes the same shape, in a part of the time."""
        return Work(*(values[:: max(every, 1)] for values in (self.prompts, self.found, self.answers, self.scored)))


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
        columns = (work.prompts, work.found, work.answers, np.minimum(need, self.free), work.scored)
        self.rows: Iterator[tuple[int, int, int, int, int]] = _rows(columns)
        self.next = next(self.rows, None)
        self.step = self.decoding = self.running = 0
        self.context = self.own = 0.0  # positions that decoding rows look at, and those that are theirs alone
        self.ends: list[tuple[int, int, float, float]] = []  # (step, memory, context, own) of decoding rows
        self.prompts: deque[list[int]] = deque()  # [start, end, tokens of answer, memory, shared] being computed
        self.backlog = self.starts = self.scored = 0
        self.opened = 0  # tokens of the prompts of rows let in since the last step
        self.shared = 0  # positions that the row let in last has found

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
            length, found, answer, need, scored = self.next
            if need > self.free and self.running:
                return True
            self.free -= need
            self.running += 1
            self.starts += 1
            self.opened += length
            self.scored += scored
            self.shared = found - found % self.size
            self.backlog += length - found
            self.prompts.append([found, length, answer, need, self.shared])
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
        self._took(tokens, rows + len(done), pairs, read, 1)
        self._passed(1)
        for _, length, answer, need, shared in done:
            if answer <= 1:
                self.free += need
                self.running -= 1
                continue
            self.decoding += 1
            self.context += length
            self.own += length - shared
            heappush(self.ends, (self.step + answer - 1, need, length - self.step, length - shared - self.step))

    def _jump(self) -> None:
        """All steps until the next row ends: they differ in nothing but the answers' growth."""
        steps = max(self.ends[0][0] - self.step, 1)
        grown = self.decoding * (steps - 1) / 2
        self._took(self.decoding, self.decoding, self.context + grown, self.own + grown, steps)
        self._passed(steps)

    def _took(self, tokens: int, rows: int, pairs: float, read: float, steps: int) -> None:
        """Account for steps alike."""
        seen = self.context + self.decoding * steps / 2 + sum(part[0] for part in self.prompts)
        listed = seen / self.size + self.running / 2
        opened = self.opened / self.cost.block
        parts = self.cost.parts(tokens, rows, pairs, read, self.starts, self.scored, listed, opened)
        self.time.add(parts, self.least, steps, tokens)
        self.starts = self.scored = self.opened = 0
        held = self.shared + self.own + self.decoding * steps + sum(part[0] - part[4] for part in self.prompts)
        self.time.peak = max(self.time.peak, held / self.size + self.running / 2)  # a row's last block is half full

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


def _rows(columns: tuple[Ints, ...]) -> Iterator[tuple[int, int, int, int, int]]:
    """Columns as rows, a part at a time: a number of Python takes four times the room of one in an array."""
    for low in range(0, len(columns[0]), PART):
        yield from zip(*(column[low : low + PART].tolist() for column in columns), strict=True)
