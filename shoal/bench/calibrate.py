"""What a step costs on this machine: the real engine with a few layers of a model's own shapes and random weights.

It knows the engine and the clock, and must not know any job. Run as a process: it prints one JSON object.
Layers are alike, so a few of them tell what all take: the time of a step with several less that with one is theirs.
Prompts show what tokens cost, and what rows cost beyond that (head, sampling, their own attention, the engine itself)
is left of steps that give each of many rows a token.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import torch

from shoal.bench.steps import RandomWeights, Skipping
from shoal.build import WallClock
from shoal.core.types import TOKEN, Request, Sampling, Tokens
from shoal.engine import Engine, Executor
from shoal.host import settle_interpreter
from shoal.kernels import load
from shoal.nn.arch import ModelConfig, read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import KV_DTYPES, Weights, model_bytes
from shoal.runtime.runner import ModelRunner
from shoal.sched.cost import along
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler

PAGE = 32
LAYER_WEIGHTS = 60_000_000  # of all layers measured, about: enough to be out of the caches, few enough for seconds
ROWS = (1, 16, 64, 256)  # sequences that each get a token
CHUNKS = (16, 64, 256, 1024)  # tokens of a prompt
FAR, CHUNK = 3584, 256  # a chunk of a prompt this far in shows what looking back costs
LONG, LONG_ROWS = 1024, 64  # rows of this many tokens show what reading them costs
WAITING = 768  # rows that wait beside a full step: a job keeps so many in an engine, about
SHARE = 0.25  # seconds of each measurement, about


@dataclass(frozen=True, slots=True)
class Bench:
    """A model of a few layers, and the same with one of them alone."""

    config: ModelConfig
    few: ModelRunner
    one: ModelRunner
    pages: int

    def close(self) -> None:
        """End the kernels' threads."""
        self.few.close()
        self.one.close()


def build(config: ModelConfig, mode: str, kv_mode: str) -> Bench:
    """A model with some layers of `config`, random weights, and pages for what is measured."""
    layer = config.width * (2 * (config.num_heads + config.num_kv_heads) * config.head_dim + 3 * config.inner)
    count = min(config.num_layers, max(2, LAYER_WEIGHTS // layer))
    few = replace(config, layers=config.layers[:count], context=min(config.context, FAR + CHUNK + 64))
    kernels = load("auto")
    decoder = Decoder(few, cast(Weights, RandomWeights(few, mode)), kernels, (), KV_DTYPES[kv_mode])
    pages = LONG_ROWS * (LONG // PAGE + 2) + 4 * max(ROWS)
    kv = decoder.new_kv(pages, PAGE)
    for tensor in vars(kv).values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()  # skipped positions are read: they must be numbers, and in memory
    short = copy.copy(decoder)
    short.layers, short.whole = decoder.layers[:1], decoder.whole[:1]
    runners = [ModelRunner(each, kernels, kv, config.vocab_size) for each in (decoder, short)]
    return Bench(few, *runners, pages)


def engine(
    executor: Executor, bench: Bench, budget: Budget, prompts: Sequence[Tokens], answer: int, temperature: float = 0.0
) -> Engine:
    """An engine with all prompts in it."""
    policy = BatchPolicy(budget)
    made = Engine(Scheduler(policy, bench.pages, PAGE), executor, WallClock(), ahead=1)
    for row, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=answer, temperature=temperature, seed=row)
        refused = made.add(Request(str(row), prompt, sampling, index=row, future=()))
        assert refused is None, refused
    return made


def prompt(seed: int, count: int, vocabulary: int) -> Tokens:
    """Tokens that no other seed's begin with."""
    return array(TOKEN, [(7919 * (seed + 1) + 104729 * i) % vocabulary for i in range(count)])


def decode(executor: Executor, bench: Bench, rows: int, context: int = 4, temperature: float = 0.0) -> float:
    """Seconds of a step that gives each of so many rows a token."""
    steps = 24
    more = WAITING if rows == max(ROWS) else 0
    prompts = [prompt(row, context, bench.config.vocab_size) for row in range(rows + more)]
    made = engine(executor, bench, Budget(4096, rows), prompts, steps + 8 + rows * context // 4096, temperature)
    while made.last is None or made.last.num_tokens != rows or len(made.scheduler.running) < rows:
        made.step()
    made.step()
    seconds, end = [], time.perf_counter() + SHARE
    while made.busy and (len(seconds) < 3 or (len(seconds) < steps and time.perf_counter() < end)):
        began = time.perf_counter()
        made.step()
        seconds.append(time.perf_counter() - began)
    for row in range(len(prompts)):
        made.cancel(str(row))
    while made.busy:
        made.step()
    return median(seconds)


def prefill(executor: Executor, bench: Bench, tokens: int) -> float:
    """Seconds of the step that computes a prompt, or what is not skipped of it, and gives it a token."""
    seconds, end = [], time.perf_counter() + SHARE
    while len(seconds) < 2 or time.perf_counter() < end:
        prompts = [prompt(len(seconds), tokens, bench.config.vocab_size)]
        made = engine(executor, bench, Budget(tokens, 1), prompts, 1)
        began = time.perf_counter()
        while made.busy:
            made.step()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def begin(executor: Executor, bench: Bench, step: float) -> float:
    """Seconds to let a row in, beside a full step of so many seconds: rows come and go, and nothing else changes."""
    rows = max(ROWS)
    prompts = [prompt(row, 4, bench.config.vocab_size) for row in range(rows + WAITING)]
    made = engine(executor, bench, Budget(4096, rows), prompts, 4)
    began, steps = time.perf_counter(), 0.0
    while made.busy:
        made.step()
        if made.last is not None:
            steps += made.last.num_tokens / rows
            made.last = None
    return max(time.perf_counter() - began - steps * step, 0.0) / len(prompts)


def measure(bench: Bench, num_layers: int) -> dict[str, object]:
    """The curves and rates of `sched.cost.MeasuredCost` for a model of so many layers."""
    count = bench.config.num_layers

    def both(work: Callable[..., float], size: int) -> tuple[float, float]:
        """Seconds of a whole step, and of them the layers', if the model had all its layers."""
        few = work(bench.few, bench, size)
        layer = max(few - work(bench.one, bench, size), 0.0) / (count - 1) if count > 1 else few
        return few + (num_layers - count) * layer, num_layers * layer

    context = min(FAR, bench.config.context - CHUNK - 64)
    looking, near = (prefill(Skipping(bench.few, CHUNK), bench, tokens) for tokens in (context + CHUNK, CHUNK))
    pair = max(looking - near, 0.0) / (CHUNK * context) * num_layers / count
    decodes = {rows: both(decode, rows) for rows in ROWS}
    layers = [(1, decodes[1][1])]
    for tokens in sorted({min(tokens, context) for tokens in CHUNKS}):
        seconds = both(prefill, tokens)[1] - pair * tokens * tokens / 2
        layers.append((tokens, max(seconds, layers[-1][1])))
    answers: list[tuple[int, float]] = []
    for rows, (seconds, _) in decodes.items():
        rest = seconds - along(tuple(layers), rows)
        answers.append((rows, max(rest, answers[-1][1] if answers else 1e-6)))
    long, short = decode(Skipping(bench.few), bench, LONG_ROWS, min(LONG, context)), decode(bench.few, bench, LONG_ROWS)
    position = max(long - short, 0.0) / (LONG_ROWS * min(LONG, context)) * num_layers / count
    drawn = max(decode(bench.few, bench, LONG_ROWS, temperature=1.0) - short, 0.0) / LONG_ROWS
    came = begin(bench.few, bench, decode(bench.few, bench, max(ROWS)))
    found = {
        "begin": came,
        "layers": layers,
        "answers": answers,
        "pair": pair,
        "read": max(position - pair, 0.0),
        "draw": drawn,
    }
    return {**found, "block": PAGE}


def main() -> None:
    """Run as `python -m shoal.bench.calibrate FOLDER WEIGHTS KV BEGAN`: the last is the clock when it was started."""
    folder, mode, kv_mode, began = sys.argv[1:]
    started = time.monotonic() - float(began)
    config = read_config(folder)
    built = time.monotonic()
    bench = build(config, mode, kv_mode)
    ready = time.monotonic()
    settle_interpreter()
    decode(bench.few, bench, 8)  # whatever is slow once
    found = measure(bench, config.num_layers)
    found |= {"start": started, "build": ready - built, "measure": time.monotonic() - ready}
    found |= {"threads": torch.get_num_threads(), "measured_bytes": model_bytes(bench.config, mode)}
    bench.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
