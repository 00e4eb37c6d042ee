"""The executor over a model: runs steps in order, in one thread of its own.

It knows tickets, hidden states and what a row wants of them; it must not know why a step is as it is.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

import numpy as np
import torch

from shoal.core.types import Answer, Request, Slice, Start, Step, StepResult, TokenScore
from shoal.kernels.api import KV, Batch, Kernels
from shoal.nn.encoder import LEAST_NORM
from shoal.nn.masks import Masks
from shoal.nn.sampler import Sampler
from shoal.nn.scores import score
from shoal.runtime.batch import Layout, lay_out, moves_tensor

_LOGIT_BYTES = 32 << 20  # of float32 logits at a time; reductions over them need about six times as much beside
_TILE = 16  # rows of a matrix product: a multiple wastes none


class Model(Protocol):
    """What the runner needs of a decoder."""

    def forward(self, batch: Batch, kv: KV, begun: Callable[[], None]) -> torch.Tensor:
        """Write the step's keys and values; return the hidden states of the wanted positions as [R, D]. `begun` is
        called when nothing but the kernels' work is left."""
        ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Return float32 [R, V]."""
        ...


class StepInFlight:
    """A step handed to the worker."""

    def __init__(self, future: Future[StepResult], told: Event | None = None) -> None:
        """`told` is set when the step's end may be known; None: at once."""
        self._future, self._told = future, told

    def wait(self) -> StepResult:
        """Block until the step is done. Whatever went wrong in it is raised here."""
        if self._told is not None:
            self._told.wait()
        return self._future.result()


@dataclass(slots=True)
class _Ticket:
    """What the runner remembers of a started sequence."""

    request: Request
    known: int  # tokens that exist: prompt, produced and sampled
    problem: str  # why it cannot be run, or ''


@dataclass(slots=True)
class _Wishes:
    """What is to be made of the wanted hidden states; numbers are rows of them."""

    sample_rows: list[int] = field(default_factory=list)
    sample_tickets: list[int] = field(default_factory=list)
    score_rows: list[int] = field(default_factory=list)
    score_tokens: list[int] = field(default_factory=list)
    score_tickets: list[int] = field(default_factory=list)  # owner of each row
    vector_rows: dict[int, int] = field(default_factory=dict)  # by ticket


class ModelRunner:
    """Runs steps of one model. `submit` may be called from any one thread; all tensors are touched by the worker."""

    def __init__(
        self, model: Model, kernels: Kernels, kv: KV, vocab_size: int, adapters: Sequence[str] = (),
        masks: Masks | None = None, normalize: bool = False, classifier: bool = False,
    ) -> None:  # fmt: skip
        """`adapters` are the names of the model's, by number; `masks` keep the constraints of requests: without them a
        request that has one is refused. With `normalize` vectors have length 1. Those of a `classifier` are what its
        head makes of a hidden state, and it has no words."""
        self._adapters = {name: number for number, name in enumerate(adapters)}
        self._adapted: dict[int, int] = {}  # ticket -> number of its adapter; changed by `submit` alone
        self._model, self._kernels, self._kv, self._vocab_size = model, kernels, kv, vocab_size
        self._normalize, self._classifier = normalize, classifier
        self._sampler = Sampler(vocab_size, kernels, masks)
        self._tickets: dict[int, _Ticket] = {}
        self._last: dict[int, int] = {}  # ticket -> the token it sampled last
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-kernels")
        self._handed_in = 0  # steps; changed by `submit` alone, and never more than were queued
        self._taken_up = 0  # of them
        self._untold: Event | None = None  # of the step that has ended last

    def submit(self, step: Step) -> StepInFlight:
        """Run the step after all earlier ones. It is laid out at once, while those run; so are constraints compiled."""
        for ticket in step.drops:
            self._adapted.pop(ticket, None)
        for start in step.starts:
            if start.request.adapter in self._adapters:
                self._adapted[start.ticket] = self._adapters[start.request.adapter]
            self._sampler.prepare(start)
        layout = lay_out(step, self._kv.page_size, self._vocab_size, self._adapted) if step.slices else None
        told = Event()
        future = self._worker.submit(self._work, step, layout, told)
        self._handed_in += 1  # only now: were a step counted that an interrupt keeps out, the last would wait for it
        return StepInFlight(future, told)

    def close(self) -> None:
        """Wait for the steps in flight and end the worker. No step may follow."""
        self._worker.shutdown()
        self._sampler.close()

    # -- all below runs in the worker ------------------------------------------------------------------

    def _work(self, step: Step, layout: Layout | None, told: Event) -> StepResult:
        """Run a step and tell that it has ended; where another waits already, when that one has come to the kernels.
        Whoever is told plans the one after next, and the two would take the interpreter from each other."""
        self._taken_up += 1
        try:
            return self._run(step, layout)
        finally:
            self._tell()
            self._untold = told
            if self._taken_up >= self._handed_in:  # more where an interrupt has kept one out of the count
                self._tell()

    def _tell(self) -> None:
        if self._untold is not None:
            self._untold.set()

    def _run(self, step: Step, layout: Layout | None) -> StepResult:
        began = time.perf_counter()
        result = StepResult({})
        with torch.inference_mode():
            for ticket in step.drops:
                self._drop(ticket)
            for start in step.starts:
                self._start(start)
            if step.moves:
                self._kernels.move_blocks(self._kv, moves_tensor(step.moves))
            if layout is not None:
                hidden_RD = self._model.forward(layout.batch(self._last, self._kernels.device), self._kv, self._tell)
                wishes = self._wishes(step.slices, result)
                self._score(hidden_RD, wishes, result)
                self._sample(hidden_RD, wishes, result)
                self._vectors(hidden_RD, wishes, result)
        result.seconds = time.perf_counter() - began
        return result

    def _start(self, start: Start) -> None:
        prompt = np.frombuffer(start.request.prompt, dtype=np.int32)
        problem = ""
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            problem = f"the prompt has a token outside the model's vocabulary of {self._vocab_size} tokens"
        if start.request.adapter and start.request.adapter not in self._adapters:
            problem = f"no adapter {start.request.adapter!r} is loaded: known are {', '.join(self._adapters) or 'none'}"
        if self._classifier and start.request.answer is not Answer.VECTOR:
            problem = "this model makes numbers of its labels, and no text: ask for a vector, or take another model"
        known = len(start.request.prompt) + len(start.produced)
        self._tickets[start.ticket] = _Ticket(start.request, known, problem)
        self._sampler.start(start)

    def _drop(self, ticket: int) -> None:
        self._tickets.pop(ticket, None)
        self._last.pop(ticket, None)
        self._sampler.drop(ticket)

    def _wishes(self, slices: tuple[Slice, ...], result: StepResult) -> _Wishes:
        """Sort the wanted positions: a prompt token to score, the last known position, or nobody's."""
        wishes, row = _Wishes(), 0
        for part in slices:
            state, end = self._tickets[part.ticket], part.start + len(part.tokens)
            first, row = row, row + part.want
            request = state.request
            if state.problem:
                result.errors[part.ticket] = state.problem
                continue
            if request.score_from >= 1:
                tokens = request.prompt[end - part.want + 1 : end + 1]  # none where the prompt is over
                wishes.score_rows += range(first, first + len(tokens))
                wishes.score_tokens += tokens
                wishes.score_tickets += [part.ticket] * len(tokens)
            if part.want and end == state.known:
                if request.answer is Answer.VECTOR:
                    wishes.vector_rows[part.ticket] = row - 1
                elif request.samples:
                    wishes.sample_rows.append(row - 1)
                    wishes.sample_tickets.append(part.ticket)
        return wishes

    @property
    def _rows_at_once(self) -> int:
        return max(_TILE, _LOGIT_BYTES // (4 * self._vocab_size) // _TILE * _TILE)

    def _score(self, hidden_RD: torch.Tensor, wishes: _Wishes, result: StepResult) -> None:
        size = self._rows_at_once
        for first in range(0, len(wishes.score_rows), size):
            part = slice(first, first + size)
            owners = wishes.score_tickets[part]
            tops = [self._tickets[ticket].request.score_top for ticket in owners]
            logits_RV = self._logits(hidden_RD, wishes.score_rows[part])
            found = score(self._kernels, logits_RV, wishes.score_tokens[part], max(tops))
            for ticket, top, each in zip(owners, tops, found, strict=True):
                if not math.isfinite(each.logprob):
                    result.errors[ticket] = "the model's logits over the prompt are not finite: check the checkpoint"
                kept = each if len(each.top) == top else TokenScore(each.token, each.logprob, each.rank, each.top[:top])
                result.scores.setdefault(ticket, []).append(kept)

    def _sample(self, hidden_RD: torch.Tensor, wishes: _Wishes, result: StepResult) -> None:
        size = self._rows_at_once
        for first in range(0, len(wishes.sample_rows), size):
            part = slice(first, first + size)
            logits_RV = self._logits(hidden_RD, wishes.sample_rows[part])
            samples = self._sampler.sample(logits_RV, wishes.sample_tickets[part])
            for ticket, token in samples.tokens.items():
                result.tokens[ticket] = [token]
                self._last[ticket] = token
                self._tickets[ticket].known += 1
            for ticket, forced in samples.forced.items():
                result.forced[ticket] = forced
                self._tickets[ticket].known += len(forced)
            for ticket, each in samples.logprobs.items():
                result.logprobs[ticket] = [each]
            result.errors.update(samples.errors)

    def _vectors(self, hidden_RD: torch.Tensor, wishes: _Wishes, result: StepResult) -> None:
        rows = list(wishes.vector_rows.values())
        if not rows:
            return
        found = self._logits(hidden_RD, rows) if self._classifier else [hidden_RD[row] for row in rows]
        for ticket, each in zip(wishes.vector_rows, found, strict=True):
            vector = each.double().cpu()
            if self._normalize:
                vector /= vector.norm().clamp_min(LEAST_NORM)
            if bool(vector.isfinite().all()):
                result.vectors[ticket] = array("f", vector.tolist())
            else:
                result.errors[ticket] = "the model's hidden state is not finite: check the checkpoint"

    def _logits(self, hidden_RD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if len(rows) == hidden_RD.shape[0]:
            return self._model.logits(hidden_RD)
        return self._model.logits(hidden_RD[torch.tensor(rows, device=hidden_RD.device)])
