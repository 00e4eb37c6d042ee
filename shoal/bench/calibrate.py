"""What a step costs on this machine: the real engine with a few layers of a model's own shapes and random weights.

It knows the engine and the clock, and must not know any job. Run as a process: it prints one JSON object.
Layers are alike, so a few of them tell what all take: the time of a step with several less that with one is theirs.
Prompts show what tokens cost, and what rows cost beyond that (head, sampling, their own attention, the engine itself)
is left of steps that give each of many rows a token.

The same work takes one and a half times as long, or twice, where a neighbour of a virtual machine is at work, for
seconds at a time. So everything is timed in several rounds: the least time of each says how the parts compare, and all
of them are scaled by how much longer they took on the whole.
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
from statistics import mean, median
from typing import cast

import torch

from shoal.bench.steps import RandomWeights, Skipping
from shoal.build import WallClock
from shoal.client import InProcess
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
SHARE = 0.02  # seconds of each measurement in a round, about, and
LEAST = 3  # times at least
ROUNDS = 10  # at most
LONGEST = 5.0  # seconds of all rounds, unless one alone takes longer
BEGIN_ANSWER = 2  # tokens


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
) -> InProcess:  # fmt: skip
    """An engine with all prompts in it, seen as its process sees it: what that does with every output is timed too."""
    policy = BatchPolicy(budget)
    made = Engine(Scheduler(policy, bench.pages, PAGE), executor, WallClock(), ahead=1)
    for row, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=answer, temperature=temperature, seed=row)
        refused = made.add(Request(str(row), prompt, sampling, index=row, future=(), score_from=score_from))
        assert refused is None, refused
    return InProcess(made)


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
    backend = engine(executor, bench, Budget(4096, rows), prompts, steps + 8 + rows * context // 4096, temperature)
    made = backend.engine
    while made.last is None or made.last.num_tokens != rows or len(made.scheduler.running) < rows:
        backend.outputs()
    backend.outputs()
    seconds, end = [], time.perf_counter() + SHARE
    while made.busy and (len(seconds) < LEAST or (len(seconds) < steps and time.perf_counter() < end)):
        began = time.perf_counter()
        backend.outputs()
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
        seconds.append(_to_the_end(engine(executor, bench, Budget(tokens, 1), prompts, 1, score_from=score_from)))
    return median(seconds)


def begin(executor: Executor, bench: Bench, shared: int = 0) -> float:
    """Seconds of full steps in which rows come and go: each has `BEGIN_ANSWER` tokens, and begins with `shared` ones
    that all have."""
    rows, first = max(ROWS), prompt(0, shared, bench.config.vocab_size)
    prompts = [first + prompt(row, 1, bench.config.vocab_size) for row in range(rows + WAITING)]
    return _to_the_end(engine(executor, bench, Budget(4096, rows), prompts, BEGIN_ANSWER))


def _to_the_end(backend: InProcess) -> float:
    began = time.perf_counter()
    while backend.engine.busy:
        backend.outputs()
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
        ("opened", max(ROWS)): partial(begin, Skipping(bench.few), bench, min(LONG, context)),
    }
    for name, runner in (("few", bench.few), ("one", bench.one)):
        found |= {(f"decode {name}", rows): partial(decode, runner, bench, rows) for rows in ROWS}
        found |= {
            (f"prefill {name}", tokens): partial(prefill, runner, bench, tokens)
            for tokens in sorted({min(tokens, context) for tokens in CHUNKS})
        }
    return found


def timed(work: dict[tuple[str, int], Callable[[], float]]) -> tuple[dict[tuple[str, int], float], float]:
    """Seconds of everything, and the share by which all of it took longer in one round than in another."""
    rounds: list[dict[tuple[str, int], float]] = []
    began = time.perf_counter()
    while not rounds or (len(rounds) < ROUNDS and (time.perf_counter() - began) * (1 + 1 / len(rounds)) <= LONGEST):
        rounds.append({key: trial() for key, trial in work.items()})
    least = {key: min(each[key] for each in rounds) for key in work}
    slower = [mean(each[key] / least[key] for key in work) for each in rounds]
    return {key: mean(slower) * seconds for key, seconds in least.items()}, max(slower) / min(slower) - 1


def measure(bench: Bench, num_layers: int) -> dict[str, object]:
    """The curves and rates of `sched.cost.MeasuredCost` for a model of so many layers."""
    count, work = bench.config.num_layers, trials(bench)
    for name in ("looking", "scored"):  # what is slow once
        next(trial for key, trial in work.items() if key[0] == name)()
    took, unsteady = timed(work)

    def layer(name: str, size: int) -> float:
        """Seconds of a layer that computes all positions: the last one, which alone is left in `one`, need not."""
        few = took[f"{name} few", size]
        return max(few - took[f"{name} one", size], 0.0) / (count - 1) if count > 1 else few

    def whole(name: str, size: int) -> float:
        """Seconds of a step, if the model had all its layers."""
        return took[f"{name} few", size] + (num_layers - count) * layer(name, size)

    sizes = {name: size for name, size in took if " " not in name}
    alone = {name: took[name, size] for name, size in sizes.items()}
    context = sizes["looking"]
    pair = max(alone["looking"] - alone["near"], 0.0) / (CHUNK * context) * num_layers / count
    single = whole("decode", 1)
    layers = [(1, min(max(num_layers * layer("decode", 1), 1e-6), single))]
    for tokens in (tokens for name, tokens in took if name == "prefill few"):
        seconds = whole("prefill", tokens) - (single - layers[0][1]) - pair * tokens * tokens / 2
        layers.append((tokens, max(seconds, layers[-1][1])))
    answers: list[tuple[int, float]] = []
    for rows in ROWS:
        rest = whole("decode", rows) - along(tuple(layers), rows)
        answers.append((rows, max(rest, answers[-1][1] if answers else 1e-6)))
    short = took["decode few", LONG_ROWS]
    position = max(alone["long"] - short, 0.0) / (LONG_ROWS * min(LONG, context)) * num_layers / count
    return {
        "layers": layers,
        "answers": answers,
        "pair": pair,
        "read": max(position - pair, 0.0),
        "draw": max(alone["drawn"] - short, 0.0) / LONG_ROWS,
        "score": max(alone["scored"] - took["prefill few", CHUNK], 0.0) / (CHUNK - 1),
        "unsteady": unsteady,
        "block": PAGE,
        **of_rows(took, alone, min(LONG, context), count / num_layers * pair, count / num_layers * position),
    }


def of_rows(
    took: dict[tuple[str, int], float], alone: dict[str, float], far: int, pair: float, position: float
) -> dict[str, float]:  # fmt: skip
    """What rows cost by themselves and by the blocks they list; `far` tokens are shared by all, and looking at one
    takes `pair`, where nobody else does `position` seconds."""
    many = max(ROWS)
    short, long = took["decode few", many], alone["listed"]
    looks = many * far * pair + far * max(position - pair, 0.0)
    rows = many + WAITING
    steps = rows * BEGIN_ANSWER / many
    begin = max(alone["begin"] - steps * short, 0.0) / rows
    opened = max(alone["opened"] - steps * max(long, short), 0.0) / rows
    return {
        "begin": begin,
        "opened": max(opened - begin, 0.0) / (far / PAGE),
        "listed": max(long - short - looks, 0.0) / (many * far / PAGE),
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
