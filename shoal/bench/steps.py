"""Single steps of a whole model with random weights: decodes by batch, and Python's share when batch and context are
large.

It knows how an engine is put together and Qwen2.5-0.5B's shape; it must not know workloads.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import torch

from shoal.bench.floor import Costs, costs
from shoal.bench.limits import Limits
from shoal.bench.single import VOCAB, random
from shoal.bench.watch import Watch, watched
from shoal.build import WallClock
from shoal.core.types import TOKEN, Request, Sampling, Slice, Step, Tokens
from shoal.engine import Engine, Executor, Pending
from shoal.host import settle_interpreter
from shoal.kernels import Kernels, load
from shoal.nn.arch import ModelConfig, make_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import MODES, Weights, expected_shapes
from shoal.runtime.runner import ModelRunner
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Budget
from shoal.sched.scheduler import Scheduler

BATCHES = (1, 8, 32, 64)
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
_PAGE = 32
_LARGE = (256, 7744, 256)  # rows, tokens that all share, tokens of each row's own: 256 rows of 8,000
_STEPS = 24  # decodes of each measurement, of which the middle counts


@dataclass(frozen=True, slots=True)
class Decodes:
    """Steps that give each of `rows` sequences a token. `share` is the floor over the seconds; `parts` are shares of
    the seconds of watched steps."""

    rows: int
    context: int  # tokens of each row
    seconds: float
    share: float
    parts: dict[str, float]

    def line(self) -> str:
        """For the terminal."""
        parts = ", ".join(f"{name} {100 * share:.1f}%" for name, share in self.parts.items())
        return (
            f"decode step, {self.rows} rows of {self.context} tokens: {1e3 * self.seconds:.2f} ms, "
            f"{self.rows / self.seconds:.0f} tokens/s, {100 * self.share:.0f}% of the limit; {parts}"
        )


class RandomWeights:
    """A checkpoint that is nowhere."""

    def __init__(self, config: ModelConfig, mode: str) -> None:
        self.dtype, self.mode, self.head_mode = MODES[mode]
        self._shapes = expected_shapes(config)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def take(self, name: str) -> torch.Tensor:
        return random(*self._shapes[name], dtype=self.dtype)

    def layer_weight(self, name: str) -> torch.Tensor:
        return self.take(f"{name}.weight")

    def head(self, name: str) -> torch.Tensor:
        return self.take(f"{name}.weight")

    def layer_bias(self, name: str) -> torch.Tensor:
        return self.take(f"{name}.bias")

    def norm(self, name: str) -> torch.Tensor:
        return torch.ones(self._shapes[f"{name}.weight"])


class Skipping:
    """Runs of a prompt only the last tokens, as if the others had been computed: it fills a memory with long rows in
    seconds, for measuring what comes after. Answers are those of no model."""

    def __init__(self, runner: ModelRunner, keep: int = 1) -> None:
        self._runner, self._keep = runner, keep

    def submit(self, step: Step) -> Pending:
        slices = tuple(self._last(part) for part in step.slices if len(part.tokens) == 1 or part.want)
        return self._runner.submit(replace(step, slices=slices))

    def _last(self, part: Slice) -> Slice:
        tokens = part.tokens[-self._keep :]
        start = part.start + len(part.tokens) - len(tokens)
        return replace(part, start=start, tokens=tokens, want=min(part.want, 1))


def run(limits: Limits, mode: str) -> Iterator[Decodes]:
    """Decode steps of Qwen2.5-0.5B's full shape with weights of a mode: small batches of short rows, then 256 rows of
    8,000 tokens."""
    config = make_config(QWEN)
    kernels = load("auto")
    decoder = Decoder(config, cast(Weights, RandomWeights(config, mode)), kernels)
    rows, shared, own = _LARGE
    pages = -(-shared // _PAGE) + rows * (-(-(own + 2 * _STEPS) // _PAGE) + 1)
    kv = decoder.new_kv(pages, _PAGE)
    for tensor in vars(kv).values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()  # skipped positions are read: they must be numbers, and in memory
    runner, model = ModelRunner(decoder, kernels, kv, config.vocab_size), costs(config, mode)
    settle_interpreter()
    try:
        for batch in BATCHES:
            prompts = [_tokens(row, 32) for row in range(batch)]
            yield _decodes(runner, kernels, prompts, pages, model, limits, 32 * batch)
        prompts = [_tokens(rows, shared) + _tokens(row, own) for row in range(rows)]
        skipping = Skipping(runner)
        yield _decodes(skipping, kernels, prompts, pages, model, limits, shared + rows * own)
    finally:
        runner.close()


def _tokens(seed: int, count: int) -> Tokens:
    return array(TOKEN, [(7919 * (seed + 1) + 104729 * i) % VOCAB for i in range(count)])


def _decodes(
    executor: Executor, kernels: Kernels, prompts: Sequence[Tokens], pages: int, model: Costs,
    limits: Limits, distinct: int,
) -> Decodes:  # fmt: skip
    """Let all prompts in, then time steps that only decode: half of them unwatched, a quarter watched as they are, for
    Python's share, and a quarter in parts, for the others'."""
    policy = BatchPolicy(Budget(2048, len(prompts)))
    engine = Engine(Scheduler(policy, pages, _PAGE), executor, WallClock(), ahead=1)
    for row, prompt in enumerate(prompts):
        refused = engine.add(Request(str(row), prompt, Sampling(max_tokens=2 * _STEPS + 2), index=row))
        assert refused is None, refused
    while engine.last is None or engine.last.num_tokens != len(prompts) or engine.scheduler.waiting:
        engine.step()
    engine.step()
    seconds = median(_steps(engine, _STEPS // 2))
    whole, wall = _watched_steps(engine, kernels, False)
    python = whole.parts(wall)["python"] / wall
    watch, wall = _watched_steps(engine, kernels, True)
    parts = watch.parts(wall)
    inside = wall - parts["python"]
    parts = {name: (1 - python) * part / inside for name, part in parts.items()} | {"python": python}
    while engine.busy:
        engine.step()
    produced = len(prompts) * _STEPS
    context = len(prompts[0]) + _STEPS
    work = 2 * model.linear / limits.peak[model.linear_arithmetic]
    work += 2 * model.head / limits.peak[model.head_arithmetic]
    work += model.query_key * context * len(model.windows) / limits.peak[model.other_arithmetic]
    size = model.weight_bytes + model.position_bytes * len(model.windows) * (distinct + produced)
    least = max(len(prompts) * work, size / limits.bandwidth)
    return Decodes(len(prompts), context, seconds, least / seconds, parts)


def _watched_steps(engine: Engine, kernels: Kernels, parts: bool) -> tuple[Watch, float]:
    """A quarter of the steps, watched, and their seconds."""
    with watched(kernels, parts) as watch:
        engine.step()  # it was under way before anybody watched
        watch.seconds.clear()
        return watch, sum(_steps(engine, _STEPS // 4))


def _steps(engine: Engine, count: int) -> list[float]:
    """Seconds of so many steps."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds
