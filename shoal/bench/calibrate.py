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
from functools import partial
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
SHARE = 0.06  # seconds of each measurement in a round, about
ROUNDS = 3  # at most
LONGEST = 6.5  # seconds of all rounds, unless one alone takes longer
BEGIN_ANSWER = 4  # tokens


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
    few = replace(config, layers=config.layers[:count], context=min(config.context, FAR + CHUNK + 64), labels=0)
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
    executor: Executor, bench: Bench, budget: Budget, prompts: Sequence[Tokens], answer: int, temperature: float = 0.0,
    score_from: int = -1,
) -> Engine:  # fmt: skip
    """An engine with all prompts in it."""
    policy = BatchPolicy(budget)
    made = Engine(Scheduler(policy, bench.pages, PAGE), executor, WallClock(), ahead=1)
    for row, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=answer, temperature=temperature, seed=row)
        refused = made.add(Request(str(row), prompt, sampling, index=row, future=(), score_from=score_from))
        assert refused is None, refused
    return made


def prompt(seed: int, count: int, vocabulary: int) -> Tokens:
    """Tokens that no other seed's begin with."""
    return array(TOKEN, [(7919 * (seed + 1) + 104729 * i) % vocabulary for i in range(count)])


def decode(
    executor: Executor, bench: Bench, rows: int, context: int = 4, temperature: float = 0.0, shared: int = 0
) -> float:  # fmt: skip
    """Seconds of a step that gives each of so many rows a token; all begin with the same `shared` tokens."""
    steps = 24
    more = WAITING if rows == max(ROWS) else 0
    first = prompt(0, shared, bench.config.vocab_size)
    prompts = [first + prompt(row, context, bench.config.vocab_size) for row in range(rows + more)]
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


def prefill(executor: Executor, bench: Bench, tokens: int, score_from: int = -1) -> float:
    """Seconds of the step that computes a prompt, or what is not skipped of it, and gives it a token."""
    seconds, end = [], time.perf_counter() + SHARE
    while len(seconds) < 2 or time.perf_counter() < end:
        prompts = [prompt(len(seconds), tokens, bench.config.vocab_size)]
        made = engine(executor, bench, Budget(tokens, 1), prompts, 1, score_from=score_from)
        began = time.perf_counter()
        while made.busy:
            made.step()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def begin(executor: Executor, bench: Bench) -> float:
    """Seconds of full steps in which rows come and go: each has `BEGIN_ANSWER` tokens."""
    rows = max(ROWS)
    prompts = [prompt(row, 1, bench.config.vocab_size) for row in range(rows + WAITING)]
    made = engine(executor, bench, Budget(4096, rows), prompts, BEGIN_ANSWER)
    began = time.perf_counter()
    while made.busy:
        made.step()
    return time.perf_counter() - began


def trials(bench: Bench) -> dict[tuple[str, int], Callable[[], float]]:
    """All that is timed, by name and size; `few` layers and `one`."""
    context = min(FAR, bench.config.context - CHUNK - 64)
    found: dict[tuple[str, int], Callable[[], float]] = {
        ("looking", context): partial(prefill, Skipping(bench.few, CHUNK), bench, context + CHUNK),
        ("near", CHUNK): partial(prefill, Skipping(bench.few, CHUNK), bench, CHUNK),
        ("scored", CHUNK): partial(prefill, bench.few, bench, CHUNK, 1),
        ("long", LONG_ROWS): partial(decode, Skipping(bench.few), bench, LONG_ROWS, min(LONG, context)),
        ("listed", max(ROWS)): partial(decode, bench.few, bench, max(ROWS), shared=min(LONG, context)),
        ("drawn", LONG_ROWS): partial(decode, bench.few, bench, LONG_ROWS, temperature=1.0),
        ("begin", max(ROWS)): partial(begin, bench.few, bench),
    }
    for name, runner in (("few", bench.few), ("one", bench.one)):
        found |= {(f"decode {name}", rows): partial(decode, runner, bench, rows) for rows in ROWS}
        found |= {
            (f"prefill {name}", tokens): partial(prefill, runner, bench, tokens)
            for tokens in sorted({min(tokens, context) for tokens in CHUNKS})
        }
    return found


def measure(bench: Bench, num_layers: int) -> dict[str, object]:
    """The curves and rates of `sched.cost.MeasuredCost` for a model of so many layers.

    Everything is timed in several rounds, and the middle one counts: what else the machine does comes and goes.
    """
    count, work = bench.config.num_layers, trials(bench)
    rounds: list[dict[tuple[str, int], float]] = []
    began = time.perf_counter()
    while not rounds or (len(rounds) < ROUNDS and (time.perf_counter() - began) * (1 + 1 / len(rounds)) <= LONGEST):
        rounds.append({key: trial() for key, trial in work.items()})
    took = {key: median(each[key] for each in rounds) for key in work}

    def both(name: str, size: int) -> tuple[float, float]:
        """Seconds of a whole step, and of them the layers', if the model had all its layers."""
        few = took[f"{name} few", size]
        layer = max(few - took[f"{name} one", size], 0.0) / (count - 1) if count > 1 else few
        return few + (num_layers - count) * layer, num_layers * layer

    sizes = {name: size for name, size in took if " " not in name}
    alone = {name: took[name, size] for name, size in sizes.items()}
    context = sizes["looking"]
    pair = max(alone["looking"] - alone["near"], 0.0) / (CHUNK * context) * num_layers / count
    layers = [(1, max(both("decode", 1)[1], 1e-6))]
    for tokens in (tokens for name, tokens in took if name == "prefill few"):
        seconds = both("prefill", tokens)[1] - pair * tokens * tokens / 2
        layers.append((tokens, max(seconds, layers[-1][1])))
    answers: list[tuple[int, float]] = []
    for rows in ROWS:
        rest = both("decode", rows)[0] - along(tuple(layers), rows)
        answers.append((rows, max(rest, answers[-1][1] if answers else 1e-6)))
    short = took["decode few", LONG_ROWS]
    position = max(alone["long"] - short, 0.0) / (LONG_ROWS * min(LONG, context)) * num_layers / count
    many, far = max(ROWS), min(LONG, context)
    looks = (many * far * pair + far * max(position - pair, 0.0)) * count / num_layers
    listed = max(alone["listed"] - took["decode few", many] - looks, 0.0) / (many * far / PAGE)
    rows = max(ROWS) + WAITING
    steps = rows * BEGIN_ANSWER / max(ROWS)
    return {
        "begin": max(alone["begin"] - steps * took["decode few", max(ROWS)], 0.0) / rows,
        "layers": layers,
        "answers": answers,
        "pair": pair,
        "read": max(position - pair, 0.0),
        "draw": max(alone["drawn"] - short, 0.0) / LONG_ROWS,
        "score": max(alone["scored"] - took["prefill few", CHUNK], 0.0) / (CHUNK - 1),
        "unsteady": median(max(each[key] for each in rounds) / min(each[key] for each in rounds) for key in work) - 1,
        "listed": listed,
        "block": PAGE,
    }


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
