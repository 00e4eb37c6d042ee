"""Our own engine on a workload, in this process: built once, with nothing remembered from one run to the next.

It knows how the engine is put together and what an offline job asks of it; it must not know limits or other engines.
"""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.bench.machine import Span, Stopwatch
from shoal.bench.watch import Watch, watched
from shoal.bench.workloads import LEAST_TOKEN, Workload, plan_requests
from shoal.build import BuiltEngine, WallClock, build_engine, make_policy
from shoal.client import Begin, EngineProcess, InProcess
from shoal.core.config import EngineConfig
from shoal.core.errors import EngineDied, UsageError
from shoal.core.types import TOKEN, Finish, Request, Sampling
from shoal.engine import Engine
from shoal.host import settle_interpreter
from shoal.sched.scheduler import Counters, Scheduler

_WARM_UP = 8  # requests of 64 tokens in and 8 out, before anything is timed


class WrongAnswers(UsageError):
    """An engine did not give what was asked of it: its time means nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload."""

    span: Span
    steps: int
    prompt_computed: int  # prompt tokens, of which the plan's bound is the least
    output_tokens: int
    planning: float  # seconds of planning, most of them while the kernels ran
    preemptions: int


class Ours:
    """The engine with its model, ready for several runs. Close it when done."""

    def __init__(self, config: EngineConfig, workloads: Sequence[Workload]) -> None:
        """Build for these workloads. UsageError when a row does not fit the model's context."""
        self.config = config
        self.plans: dict[str, list[Request]] = {}
        useful = 0
        for workload in workloads:
            with tempfile.TemporaryDirectory() as folder:
                requests, bound = plan_requests(workload, Path(folder))
            self.plans[workload.name] = requests
            useful = max(useful, bound + workload.answer_tokens)
        self.built: BuiltEngine = build_engine(config, useful or None)
        facts = self.built.facts
        for workload in workloads:
            if workload.longest > facts.context:
                self.close()
                raise UsageError(
                    f"{workload.name} has rows of {workload.longest} tokens; the model's context is {facts.context}"
                )
        self._warm_up()
        settle_interpreter()

    def close(self) -> None:
        """End the kernels' thread."""
        self.built.close()

    def run(self, workload: Workload) -> Run:
        """Answer the whole workload, as a job would. WrongAnswers when a row has not exactly the length asked for."""
        return self._run(self.plans[workload.name])

    def watch(self, workload: Workload, parts: bool = True) -> tuple[Run, Watch]:
        """The same with a clock around every kernel: for where the time goes, not for how much it is. Without `parts`
        a layer counts as one, which it is in a run: that tells Python's share."""
        with watched(self.built.kernels, parts) as watch:
            return self._run(self.plans[workload.name]), watch

    def _run(self, requests: Iterable[Request]) -> Run:
        engine = self._fresh()
        backend, asked = InProcess(engine), {request.id: request.sampling.max_tokens for request in requests}
        stopwatch = Stopwatch()
        backend.submit(requests)
        answered = {}
        while engine.busy:
            news = backend.outputs()
            for output in news.outputs if news is not None else ():
                if output.finish is not Finish.LENGTH:
                    raise WrongAnswers(f"row {output.id} ended as {output.finish}: {output.error}")
                answered[output.id] = len(output.tokens)
        span = stopwatch.stop()
        if answered != asked:
            wrong = next(id for id, length in asked.items() if answered.get(id) != length)
            raise WrongAnswers(f"row {wrong} has {answered.get(wrong)} tokens instead of {asked[wrong]}")
        counters: Counters = engine.scheduler.counters
        return Run(
            span, counters.steps, counters.prompt_computed, sum(answered.values()), engine.seconds_planning,
            counters.preemptions,
        )  # fmt: skip

    def _fresh(self) -> Engine:
        """An engine that remembers no prefix, on the same model and the same memory."""
        config, built = self.config, self.built
        blocks = built.facts.memory.num_blocks
        scheduler = Scheduler(make_policy(config), blocks, config.block_size, config.reuse)
        return Engine(scheduler, built.runner, WallClock(), int(config.overlap))

    def _warm_up(self) -> None:
        vocab = self.built.facts.vocab_size
        prompts = [
            array(TOKEN, [LEAST_TOKEN % vocab + (97 * row + 31 * i) % max(1, vocab - LEAST_TOKEN) for i in range(64)])
            for row in range(_WARM_UP)
        ]
        self._run([Request(f"warm{row}", prompt, Sampling(max_tokens=8)) for row, prompt in enumerate(prompts)])


def first_token_seconds(config: EngineConfig, useful_tokens: int) -> float:
    """From nothing to the first token of an answer: an engine process as a job starts it, loading and all."""
    began = time.perf_counter()
    process = EngineProcess(config.threads or 0)
    try:
        process.begin(Begin(config, useful_tokens))
        while process.ready(1.0) is None:
            pass
        prompt = array(TOKEN, range(LEAST_TOKEN // 3, LEAST_TOKEN // 3 + 64))
        process.submit([Request("first", prompt, Sampling(max_tokens=1))])
        while True:
            news = process.outputs(1.0)
            if news is not None and news.outputs:
                break
        if news.outputs[0].finish is not Finish.LENGTH:
            raise EngineDied(f"the first token did not come: {news.outputs[0].error}")
        return time.perf_counter() - began
    finally:
        process.close()
