"""Prompts into one engine and their answers out, as they finish.

It knows requests, answers and the engine's news; it must not know how prompts were made, nor what they cost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.core.types import Output, Request, Tokens
from shoal.engine import Engine
from shoal.llm.outputs import Answer, RequestOutput, failed
from shoal.llm.params import SamplingParams, count_best, make_sampling
from shoal.text.checkpoint import ModelInfo
from shoal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt ready to be run, or the reason why it cannot be."""

    request_id: str
    text: str | None
    tokens: Tokens
    params: SamplingParams
    seed: int
    index: int = -1  # place in the order of common beginnings, where that is known
    salt: str = ""
    adapter: str = ""
    error: str = ""


class _Open:
    """A prompt in the engine, with its samples' answers and where its output goes."""

    def __init__(self, task: Task, answers: list[Answer], owner: _Owner) -> None:
        self.task, self.answers, self.owner = task, answers, owner
        self.left = len(answers)

    def output(self) -> RequestOutput:
        first, task = self.answers[0], self.task
        timing = first.timing or {}
        return RequestOutput(
            request_id=task.request_id,
            prompt=task.text,
            prompt_token_ids=list(task.tokens),
            outputs=[answer.completion() for answer in self.answers],
            prompt_logprobs=first.prompt_logprobs(),
            metrics=timing,
            num_cached_tokens=int(timing.get("cached", 0)),
            lora_request=task.adapter or None,
        )


class _Owner:
    """One caller: its prompts in the engine and its outputs not yet fetched."""

    def __init__(self) -> None:
        self.open: set[_Open] = set()
        self.done: deque[RequestOutput] = deque()


class Loop:
    """Steps the engine while anybody waits. Several callers may be under way by turns, in one thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._engine, self._tokenizer, self._info = engine, tokenizer, info
        self._samples: dict[str, tuple[_Open, Answer]] = {}  # by the engine's request id

    def run(self, tasks: Iterator[Task], window: int) -> Iterator[RequestOutput]:
        """Outputs in the order of finishing; takes tasks while fewer than `window` of them are in the engine."""
        owner, more = _Owner(), True
        try:
            while more or owner.open or owner.done:
                while owner.done:
                    yield owner.done.popleft()
                while more and len(owner.open) < window:
                    task = next(tasks, None)
                    more = task is not None
                    if task is not None:
                        self._add(task, owner)
                if owner.open and not owner.done:
                    self._step()
        finally:  # the caller has lost interest, or something broke
            for each in list(owner.open):
                self._forget(each)

    def _add(self, task: Task, owner: _Owner) -> None:
        error = task.error or self._misfit(task)
        if error:
            owner.done.append(failed(task.request_id, task.text, list(task.tokens), error))
            return
        params, info = task.params, self._info
        sampling = make_sampling(params, info, self._tokenizer, len(task.tokens), task.seed)
        constraint = params.constraint()
        top, now = count_best(params.prompt_logprobs, info), self._engine.clock.now()
        requests = [
            Request(
                id=f"{task.request_id}.{sample}",
                prompt=task.tokens,
                sampling=replace(sampling, sample=sample),
                constraint=constraint,
                score_from=1 if top >= 0 and sample == 0 else -1,
                score_top=max(top, 0),
                arrival=now,
                adapter=task.adapter,
                salt=task.salt,
                index=task.index,
            )
            for sample in range(params.n)
        ]
        opened = _Open(task, [Answer(each, params, self._tokenizer, info.eos) for each in requests], owner)
        owner.open.add(opened)
        for request, answer in zip(requests, opened.answers, strict=True):
            self._samples[request.id] = (opened, answer)
        for request in requests:
            refusal = self._engine.add(request)
            if refusal is not None:
                self._take(refusal)

    def _misfit(self, task: Task) -> str:
        """Why the prompt cannot be run, or ''."""
        count, info = len(task.tokens), self._info
        if not count:
            return "the prompt is empty: give it at least one token"
        if count >= info.context:
            return (
                f"the prompt has {count} tokens; the context of {info.context} must hold it and at least one more: "
                "shorten the prompt or raise max_model_len"
            )
        if min(task.tokens) < 0 or max(task.tokens) >= info.vocab_size:
            return f"the prompt has a token id outside the vocabulary of {info.vocab_size}"
        return ""

    def _step(self) -> None:
        news = self._engine.step()
        for each in news:
            self._take(each)
        until = self._engine.wait_until
        if not news and until is not None:
            time.sleep(max(0.0, until - self._engine.clock.now()))

    def _take(self, news: Output) -> None:
        found = self._samples.get(news.id)
        if found is None:
            return
        opened, answer = found
        if answer.take(news):
            last = self._engine.cancel(news.id)
            answer.timing = last.timing if last is not None else answer.timing
        if answer.finish_reason is not None:
            del self._samples[news.id]
            opened.left -= 1
            if not opened.left:
                opened.owner.open.discard(opened)
                opened.owner.done.append(opened.output())

    def _forget(self, opened: _Open) -> None:
        opened.owner.open.discard(opened)
        for answer in opened.answers:
            if self._samples.pop(answer.request.id, None) is not None:
                self._engine.cancel(answer.request.id)
