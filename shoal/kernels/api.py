"""What every backend of tensor functions provides, and the one step of work it is given.

It must not know models, requests, schedulers or files, and imports no other package of the project.

Letters in names are axes: T tokens of the step, N sequences, B pages per sequence, R wanted positions, P page size,
D model width, H query heads, G key/value heads, E head width, F half of the rotated width, L layers, V vocabulary.

Every backend is **batch-invariant**: the bits of a token's result depend on that token and its context alone, never on
the other tokens of the step, on how the prompt was cut into steps, on which pages it lives in, or on the number of
threads. tests/cpu/test_kernels.py states this as tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as tensors, all on the kernels' device. Sequence n owns tokens start[n]:start[n+1], at consecutive
    positions that end at length[n] - 1. No sequence is empty."""

    ids_T: Tensor  # int64
    pos_T: Tensor  # int64, position of each token in its sequence
    slot_T: Tensor  # int64, page * P + offset: where the token's key and value are written
    start_N1: Tensor  # int64, from 0 to T
    table_NB: Tensor  # int32, page of positions [b*P, (b+1)*P), padded with 0 which is never read as such
    length_N: Tensor  # int64, positions with key and value after this step
    out_R: Tensor  # int64, indices into T of the positions whose hidden state is needed
    wanted: Batch | None = None  # those positions as a step of their own, where they are few
    adapter_T: Tensor | None = None  # int64, number of each token's adapter, -1 for none; None: no token has one


Activation = Literal["silu", "gelu"]

Mode = Literal["plain", "int8", "int8-a16", "int4", "int4-a16"]
"""How a weight is kept and multiplied: as it comes, or quantised (quantize.py says exactly how)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How one layer's queries and keys are made of the rows that a linear layer gives."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    table: tuple[Tensor, Tensor] | None = None  # cosine and sine, float32 [positions, F]; None: no rotation
    norms: tuple[Tensor, Tensor] | None = None  # float32 weights for queries and keys
    whole: bool = False  # a norm runs over all heads of a token together instead of each
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Up:
    """The second product of a low-rank delta. It reads the first one's numbers from `begin` on, one for each of its
    columns, and is added to the layer's outputs from `first` on; of a gated layer all to one side."""

    weight_NR: Tensor
    scale: float
    begin: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to a linear layer: for each of `ups`, (x · downᵀ)[its columns] · upᵀ * scale."""

    down_HK: Tensor
    ups: tuple[Up, ...]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A decoder layer: attention, then feed-forward, each added to the stream with a factor."""

    norms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # before and after each; float32 [D]
    eps: float
    qkv: object  # packed
    heads: object  # prepared
    out: object
    gate_up: object  # packed with its gate
    down: object
    scale: float  # of scores
    window: int
    softcap: float
    factor: float


WEIGHT_BITS = 40  # weights are multiples of 2**-40 of the best token's; 2**22 of them cannot overflow 63 bits


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens to be drawn from rows of logits that end in a finite largest number, on the kernels' device."""

    row_S: Tensor  # int64, row of the logits
    number_S: Tensor  # int64, 64 random bits
    best_S: Tensor  # float32, the row's largest number
    heat_S: Tensor  # float32, above 0
    top_k_S: Tensor  # int64, 0 keeps every token
    top_p_S: Tensor  # float64, in (0, 1]
    min_p_S: Tensor  # float32, in [0, 1]


@dataclass(frozen=True, slots=True)
class Scores:
    """Where tokens stand in their rows of logits. K best tokens are listed, of equals the lowest id first."""

    best_S: Tensor  # float32, the row's largest number
    value_S: Tensor  # float32, the token's own
    weight_S: Tensor  # int64, sum of e**(x - best) over the row in units of 2**-40, each rounded down
    rank_S: Tensor  # int64, 1 is best; of equals the lowest id first
    top_id_SK: Tensor  # int64
    top_value_SK: Tensor  # float32


class KV(Protocol):
    """Keys and values of all layers in pages. The inner layout is the backend's secret."""

    @property
    def num_pages(self) -> int: ...

    @property
    def page_size(self) -> int: ...


class Kernels(Protocol):
    """The functions a model is made of. Activations are contiguous; norms and softmax are computed in float32."""

    @property
    def name(self) -> str:
        """For reports: the backend, and its instruction set where it has several."""
        ...

    @property
    def device(self) -> torch.device: ...

    def new_kv(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KV:
        """Allocate 2 * L * pages * P * G * E numbers, unwritten. The page size must divide 256.

        The dtype is that of the activations, or int8 (then they are bf16, and E is at most 512): keys and values are
        rounded as they are placed (quantize.quantize_heads), and count as what their numbers and scales mean.
        """
        ...

    def kv_bytes(self, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page in one layer, keys and values, whatever the backend adds to fill up its units."""
        ...

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None = None, mode: Mode = "plain") -> object:
        """Prepare a weight of N outputs and K inputs for `linear`. The backend may keep or copy the tensors.

        A plain weight has the dtype of the activations. To be quantised it may have any floating-point dtype, and the
        activations are bf16; ValueError when it has numbers that are not finite.
        """
        ...

    def pack_gated(
        self, weight_2FK: Tensor, bias_2F: Tensor | None = None, activation: Activation = "silu", mode: Mode = "plain"
    ) -> object:
        """Prepare a gate (the first F outputs) and what it lets through (the others) for `gated`."""
        ...

    def linear(self, x_TK: Tensor, packed: object, residual_TN: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """Return (x · weightᵀ + bias) * factor + residual as [T, N] in the dtype of x. T may be 0.

        The residual's memory may be used for the result.
        """
        ...

    def gated(self, x_TK: Tensor, packed: object) -> Tensor:
        """Return activation(gate of x) * (rest of x) as [T, F]; gelu is its tanh form."""
        ...

    def pack_deltas(self, deltas: Sequence[Delta | None], packed: object) -> object:
        """Prepare what adapters 0, 1, … add to a packed layer; None adds nothing. Tensors are of the dtype of x."""
        ...

    def group(self, adapter_T: Tensor) -> object:
        """Sort the rows of a step by adapter, for `add_deltas`; -1 is a row without one."""
        ...

    def add_deltas(self, x_TK: Tensor, y_TN: Tensor, deltas: object, grouped: object, factor: float = 1.0) -> None:
        """Add to each row of y, in place, what its adapter makes of its row of x, times the factor.

        The first product is rounded to the dtype of x, the sum to that of y. Rows without an adapter are not touched.
        """
        ...

    def gated_with(self, x_TK: Tensor, packed: object, deltas: object, grouped: object) -> Tensor:
        """Return `gated` with deltas added before the activation; rows without an adapter are those of `gated`."""
        ...

    def logits(self, x_RD: Tensor, packed: object) -> Tensor:
        """Return `linear` as float32 [R, V]: a backend may keep more digits here than `linear` does."""
        ...

    def embedding(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the rows of the table as [T, D]."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Divide each row by its root mean square and scale it; any leading axes. The weight is float32."""
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """Take each row's mean away, divide by what is left's root mean square, scale and shift. Both are float32."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """Return x times the share of the normal distribution below x; its memory may be used for the result."""
        ...

    def attention_within(self, qkv_TW: Tensor, num_heads: int, lengths: Sequence[int], scale: float) -> Tensor:
        """Let every token of a sequence attend to all of it; return [T, H * E].

        A row is [H query heads | H key heads | H value heads], `lengths` are those of the sequences that follow each
        other in T. It is fastest where equal lengths stand together.
        """
        ...

    def add(self, x_TD: Tensor, branch_TD: Tensor, factor: float = 1.0) -> Tensor:
        """Return x + branch * factor."""
        ...

    def prepare_heads(self, heads: Heads) -> object:
        """Take over what `place` needs of one layer."""
        ...

    def place(self, qkv_TW: Tensor, prepared: object, kv: KV, layer: int, batch: Batch) -> Tensor:
        """Norm and rotate queries and keys, store keys and values in their slots, return the queries as [T, H, E].

        A row is [H query heads | G key heads | G value heads]; its memory may be used for the result. A norm is
        rounded to the dtype before the rotation, which turns pairs (i, i + F) of a head by the tables' row of the
        token's position and leaves E - 2F trailing numbers. Slots of one call are distinct.
        """
        ...

    def plan(self, batch: Batch, kv: KV) -> object:
        """Work out once per step what `attention` needs in every layer. Valid for this batch alone."""
        ...

    def attention(
        self, q_THE: Tensor, kv: KV, layer: int, plan: object, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        """Each token attends to the positions p of its sequence with pos - window < p <= pos (window 0: no lower end).

        Scores are q·k * scale, then softcap * tanh(score / softcap) where a cap is given. H is a multiple of G;
        query head h reads key/value head h // (H / G). The step's own keys and values must have been written.
        Positions are counted in tiles of 256 from 0; a tile's partial uses its own maximum and partials are folded
        left to right. Memory beyond a sequence's length is never multiplied, whatever is in it.
        """
        ...

    def prepare_layer(self, parts: LayerParts) -> object | None:
        """Take over a whole layer for `layers`; None: there is no better way than one call after the other."""
        ...

    def layers(
        self, x_TD: Tensor, prepared: Sequence[object], kv: KV, first: int, batch: Batch, plan: object
    ) -> Tensor | None:
        """Return the stream after layers `first`, first + 1, …, as many as are given, the bits that their parts would
        give; None: call the parts this time.

        The memory of x may be used for the result, and is as it was where there is none.
        """
        ...

    def largest(self, x_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Index (int64) and value of each row's largest number; of equals the first. A NaN is larger than any number.

        x is float32 and contiguous.
        """
        ...

    def forbid(self, x_RV: Tensor, row_K: Tensor, bits_KW: Tensor) -> None:
        """Set number v of row row_K[k] to -infinity, in place, where bit v % 32 of bits_KW[k, v // 32] is 0.

        x is float32 and contiguous, the rows are distinct int64, W is V / 32 rounded up, the bits are int32.
        """
        ...

    def draw(self, x_RV: Tensor, draws: Draws) -> Tensor:
        """Draw a token for each, int64 [S], from the row's distribution under heat, top-k, top-p and min-p.

        It is the first at which the weights of what is kept, cumulated in the order of ids, exceed number * 2**-64 of
        their sum. Tokens equal to the last one kept are kept. Integers throughout, the same on every backend:
        `ref_sampling` says what a weight is. x is float32 and contiguous.
        """
        ...

    def score(self, x_RV: Tensor, row_S: Tensor, token_S: Tensor, top: int) -> Scores:
        """Find where tokens stand in their rows, and the best `top` <= V of each; the same on every backend.

        A row with a NaN gives a NaN as its best, and something in the other places. x is float32 and contiguous.
        """
        ...

    def move_blocks(self, kv: KV, moves_M3: Tensor) -> None:
        """For each row (src, dst, tokens), in order, copy the first `tokens` positions of page src to page dst, in
        every layer. The moves are int64 on the CPU."""
        ...
