"""The least time a workload can take on a machine of given limits, whatever the engine.

It knows a model's sizes, a workload's prompts and the limits; it must not know engines or kernels.
Per step the larger of operations over their rate and bytes over the bandwidth; every distinct prompt position is
computed once (in the last layer its keys and values alone, but for the position that is sampled from), all rows decode
together, and a step reads the weights once and each distinct position's keys and values once, however many rows attend
to it. An engine that decodes long answers while it computes other prompts can be faster: its steps are not these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.bench.limits import Limits
from shoal.bench.workloads import Workload
from shoal.kernels.api import Mode
from shoal.nn.arch import ModelConfig
from shoal.nn.weights import DTYPES, MODES

Ints = npt.NDArray[np.int64]

NO_WINDOW = 1 << 40
_BYTES: dict[Mode, float] = {"int8": 1.0, "int8-a16": 1.0, "int4": 0.5, "int4-a16": 0.5}  # of one quantised weight
_PRODUCTS: dict[Mode, str] = {
    "int8": "int8", "int8-a16": "bf16", "int4": "int8", "int4-a16": "bf16",
}  # what their products cost; two of bytes as much as one of bf16  # fmt: skip
PLAIN = {name: next(plain for plain, dtype in DTYPES.items() if dtype == mode.dtype) for name, mode in MODES.items()}
ARITHMETIC = {name: _PRODUCTS.get(mode.mode, PLAIN[name]) for name, mode in MODES.items()}  # of the layers' products
HEAD = {name: _PRODUCTS.get(mode.head, PLAIN[name]) for name, mode in MODES.items()}  # of the head's


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model's parts cost. Weights are counted in numbers, the rest in bytes."""

    linear: int  # weights of all layers
    last: (
        int  # of these, weights that only positions need whose hidden state is wanted: the last layer's, after q, k, v
    )
    head: int  # weights of the head
    weight_bytes: float  # of all layers and the head: what a step must read
    position_bytes: int  # keys and values of one position in one layer
    query_key: int  # operations of one query position on one key position in one layer
    windows: tuple[int, ...]  # of each layer; 0 sees all
    linear_arithmetic: str
    head_arithmetic: str
    other_arithmetic: str  # of attention


def costs(model: ModelConfig, mode: str) -> Costs:
    """The costs of a model whose linear layers and head have the weights of `mode`; its KV stays in 16 (or 32) bits.

    Scales of quantised weights are not counted: the floor is a floor.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.width * (2 * queries + 2 * keys + 3 * model.inner)
    head, kept = model.vocab_size * model.width, MODES[mode]
    wide = kept.dtype.itemsize
    return Costs(
        linear=model.num_layers * layer,
        last=layer - model.width * (queries + 2 * keys),
        head=head,
        weight_bytes=model.num_layers * layer * _BYTES.get(kept.mode, wide) + head * _BYTES.get(kept.head, wide),
        position_bytes=2 * keys * wide,
        query_key=4 * queries,
        windows=tuple(layer.window for layer in model.layers),
        linear_arithmetic=ARITHMETIC[mode],
        head_arithmetic=HEAD[mode],
        other_arithmetic=PLAIN[mode],
    )


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of the prompts, and of the steps that answer, and what they are made of."""

    prefill: float
    decode: float
    prompt_tokens: int  # distinct
    steps: int  # that answer, after the one that ends the prompts
    bound_by_bytes: int  # of these steps

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def floor(workload: Workload, model: Costs, limits: Limits) -> Floor:
    """The floor of a workload. Rows' first tokens come with their prompts; then step s makes token s + 1 of each."""
    prompts, answer = _sorted(workload)
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    overlap = np.array([0, *map(_overlap, prompts, prompts[1:])], dtype=np.int64)
    linear, head, other = map(limits.rate, (model.linear_arithmetic, model.head_arithmetic, model.other_arithmetic))

    def work(contexts: Ints, wanted: Ints) -> float:
        layers = [(contexts, window) for window in model.windows[:-1]] + [(wanted, model.windows[-1])]
        pairs = sum(int(np.minimum(seen, window or NO_WINDOW).sum()) for seen, window in layers)
        weights = (model.linear - model.last) * len(contexts) + model.last * len(wanted)
        return 2 * weights / linear + model.query_key * pairs / other + 2 * model.head * len(wanted) / head

    positions = np.concatenate([np.arange(a, b) + 1 for a, b in zip(overlap, length, strict=True)])
    prefill, decode, bound = work(positions, length), 0.0, 0
    for step in range(1, int(answer.max())):
        live = np.flatnonzero(answer > step)
        context = length[live] + step
        own = context - _shared(overlap, live)
        read = sum(int(np.minimum(own, window or NO_WINDOW).sum()) for window in model.windows)
        move = (model.weight_bytes + model.position_bytes * read) / limits.bandwidth
        compute = work(context, context)
        bound += move > compute
        decode += max(compute, move)
    return Floor(prefill, decode, len(positions), max(0, int(answer.max()) - 1), bound)


def _sorted(workload: Workload) -> tuple[list[Ints], Ints]:
    """Prompts in lexicographic order of their bytes, so that neighbours share most; and their answers' lengths."""
    rows = sorted(workload.rows, key=lambda row: row.prompt.tobytes())
    prompts = [np.array(row.prompt, dtype=np.int64) for row in rows]
    return prompts, np.array([row.answer for row in rows], dtype=np.int64)


def _overlap(one: Ints, other: Ints) -> int:
    """Tokens that two prompts have in common from their start."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def _shared(overlap: Ints, live: Ints) -> Ints:
    """Positions that each live row shares with the live row before it: the least overlap on the way there."""
    shared = np.zeros(len(live), dtype=np.int64)
    if len(live) > 1:
        shared[1:] = np.minimum.reduceat(overlap[: live[-1] + 1], live[:-1] + 1)
    return shared
