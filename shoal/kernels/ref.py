"""The specification of every tensor function, in plain torch on any device.

It knows how to make torch's results independent of company, and must not know models or be clever about speed.

Why each function is batch-invariant:
- matrix products are always the same call (ref_product.py), or sums of whole numbers, which are exact (quantize.py);
- sums along a row are folded by halves, element by element, so no library chooses an order;
- what is not correctly rounded (exp, tanh, rsqrt) is the same function for every element; torch's own silu, gelu and
  sigmoid are avoided, as they compute the last elements of an array by another formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.kernels import ref_sampling
from shoal.kernels.api import KV, Activation, Batch, Delta, Draws, Heads, LayerParts, Mode, Scores
from shoal.kernels.quantize import WIDEST, Quantized, mixed, product, quantize, quantize_heads, run_of
from shoal.kernels.ref_attention import TILE, Stored, TilePlan, attend, fold_sum
from shoal.kernels.ref_product import fill_weight, tiled_product


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values as [L, G, pages, P, E]: heads outermost, so that a tile of one head is one gather."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None  # of keys and of values as int8: float32 [L, G, pages, P]

    def layer(self, number: int) -> tuple[Stored, Stored]:
        """Keys and values of one layer."""
        k_scale, v_scale = (None, None) if self.scales is None else (each[number] for each in self.scales)
        return Stored(self.k[number], k_scale), Stored(self.v[number], v_scale)

    @property
    def num_pages(self) -> int:
        return self.k.shape[2]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as it is multiplied: [N, K] padded, with the number of outputs that count; or quantised."""

    weight: Tensor | Quantized
    bias: Tensor | None
    num_outputs: int
    activation: Activation = "silu"  # of a gated layer


class RefKernels:
    """`Kernels` in plain torch. Holds nothing but its name and device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "ref"

    def new_kv(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> PagedKV:
        if page_size <= 0 or TILE % page_size:
            raise ValueError(f"page size {page_size} does not divide {TILE}")
        shape = (num_layers, num_kv_heads, num_pages, page_size, head_dim)
        # Not zeroed: memory is then taken from the system page by page, as it is first written.
        k, v = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
        if dtype != torch.int8:
            return PagedKV(k, v)
        if head_dim > WIDEST:
            raise ValueError(f"heads of {head_dim} numbers cannot be kept as int8: {WIDEST} are the most")
        return PagedKV(k, v, (torch.empty(shape[:-1], device=self.device), torch.empty(shape[:-1], device=self.device)))

    def kv_bytes(self, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * page_size * num_kv_heads * (head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None = None, mode: Mode = "plain") -> Packed:
        bias = None if bias_N is None else bias_N.to(self.device)
        weight = weight_NK.to(self.device)
        return Packed(fill_weight(weight) if mode == "plain" else quantize(weight, mode), bias, len(weight))

    def pack_gated(
        self, weight_2FK: Tensor, bias_2F: Tensor | None = None, activation: Activation = "silu", mode: Mode = "plain"
    ) -> Packed:
        return replace(self.pack(weight_2FK, bias_2F, mode), activation=activation)

    def linear(self, x_TK: Tensor, packed: object, residual_TN: Tensor | None = None, factor: float = 1.0) -> Tensor:
        out = self._outputs(x_TK, packed)
        plain = residual_TN is None and factor == 1.0
        return (out if plain else self.add(residual_TN, out, factor)).to(x_TK.dtype)

    def _outputs(self, x_TK: Tensor, packed: object) -> Tensor:
        """The product with its bias: in the dtype of x, or float32 where the weight is quantised."""
        assert isinstance(packed, Packed)
        if isinstance(packed.weight, Quantized):
            out = product(x_TK, packed.weight)
        else:
            out = tiled_product(x_TK, packed.weight)[:, : packed.num_outputs].contiguous()
        if packed.bias is not None:
            out += packed.bias
        return out

    def gated(self, x_TK: Tensor, packed: object) -> Tensor:
        assert isinstance(packed, Packed)
        return self._let_through(self._outputs(x_TK, packed), packed).to(x_TK.dtype)

    def _let_through(self, both: Tensor, packed: Packed) -> Tensor:
        return self.silu_mul(both) if packed.activation == "silu" else self.gelu_mul(both)

    def pack_deltas(self, deltas: Sequence[Delta | None], packed: object) -> list[Delta | None]:
        return [None if each is None else self._filled(each) for each in deltas]

    def _filled(self, delta: Delta) -> Delta:
        """The same with weights as they are multiplied; the numbers that fill them up are cut off again."""
        ups = tuple(replace(up, weight_NR=up.weight_NR.to(self.device)) for up in delta.ups)
        return Delta(fill_weight(delta.down_HK.to(self.device)), ups)

    def group(self, adapter_T: Tensor) -> list[tuple[int, Tensor]]:
        numbers = sorted(set(adapter_T.tolist()) - {-1})
        return [(number, (adapter_T == number).nonzero()[:, 0]) for number in numbers]

    def add_deltas(self, x_TK: Tensor, y_TN: Tensor, deltas: object, grouped: object, factor: float = 1.0) -> None:
        assert isinstance(deltas, list) and isinstance(grouped, list)
        for number, rows in grouped:
            delta = deltas[number]
            if delta is None:
                continue
            narrow = tiled_product(x_TK[rows], delta.down_HK)
            for up in delta.ups:
                outputs, rank = up.weight_NR.shape
                part = narrow[:, up.begin : up.begin + rank].contiguous()
                added = tiled_product(part, fill_weight(up.weight_NR))[:, :outputs].float() * (up.scale * factor)
                columns = slice(up.first, up.first + outputs)
                y_TN[rows, columns] = (y_TN[rows, columns].float() + added).to(y_TN.dtype)

    def gated_with(self, x_TK: Tensor, packed: object, deltas: object, grouped: object) -> Tensor:
        assert isinstance(packed, Packed)
        both = self._outputs(x_TK, packed)
        self.add_deltas(x_TK, both, deltas, grouped)
        return self._let_through(both, packed).to(x_TK.dtype)

    def logits(self, x_RD: Tensor, packed: object) -> Tensor:
        return self._outputs(x_RD, packed).float()

    def embedding(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        return weight_VD.index_select(0, ids_T)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float()
        mean_square = fold_sum(x * x) / x.shape[-1]
        return (x * torch.rsqrt(mean_square + eps)[..., None] * weight_D).to(x_TD.dtype)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float()
        x = x - (fold_sum(x) / x.shape[-1])[..., None]
        return (x * torch.rsqrt(fold_sum(x * x) / x.shape[-1] + eps)[..., None] * weight_D + bias_D).to(x_TD.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (0.5 * wide * torch.erfc(wide * -math.sqrt(0.5))).to(x.dtype)

    def attention_within(self, qkv_TW: Tensor, num_heads: int, lengths: Sequence[int], scale: float) -> Tensor:
        return torch.cat([_attend_all(part, num_heads, scale) for part in qkv_TW.split(list(lengths))])

    def add(self, x_TD: Tensor | None, branch_TD: Tensor, factor: float = 1.0) -> Tensor:
        branch = branch_TD if factor == 1.0 else branch_TD * factor
        return branch if x_TD is None else x_TD + branch

    def prepare_heads(self, heads: Heads) -> Heads:
        return heads

    def place(self, qkv_TW: Tensor, prepared: object, kv: KV, layer: int, batch: Batch) -> Tensor:
        assert isinstance(prepared, Heads)
        queries, keys = prepared.num_heads * prepared.head_dim, prepared.num_kv_heads * prepared.head_dim
        q, k, v = torch.split(qkv_TW, [queries, keys, keys], dim=1)
        q_THE, k_TGE = self._positioned(q, 0, prepared, batch), self._positioned(k, 1, prepared, batch)
        self.write_kv(kv, layer, k_TGE, v.reshape(-1, prepared.num_kv_heads, prepared.head_dim), batch.slot_T)
        return q_THE

    def _positioned(self, x: Tensor, which: int, heads: Heads, batch: Batch) -> Tensor:
        """Queries (0) or keys (1) as heads, normed and rotated."""
        x = x.contiguous()
        if heads.norms and heads.whole:
            x = self.rms_norm(x, heads.norms[which], heads.eps)
        x = x.view(len(x), -1, heads.head_dim)
        if heads.norms and not heads.whole:
            x = self.rms_norm(x, heads.norms[which], heads.eps)
        return x if heads.table is None else self.rope(x, batch.pos_T, *heads.table)

    def rope(self, x_THE: Tensor, pos_T: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
        """Rotate pairs (i, i + F) of each head by the tables' row of its position."""
        half = cos_SF.shape[1]
        cos = cos_SF.index_select(0, pos_T)[:, None, :]
        sin = sin_SF.index_select(0, pos_T)[:, None, :]
        x = x_THE.float()
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(turned, dim=-1).to(x_THE.dtype)

    def write_kv(self, kv: KV, layer: int, k_TGE: Tensor, v_TGE: Tensor, slot_T: Tensor) -> None:
        """Store keys and values in their slots."""
        assert isinstance(kv, PagedKV)
        pairs = [(kv.k[layer], k_TGE), (kv.v[layer], v_TGE)]
        if kv.scales is not None:
            k_TGE, k_scale, v_TGE, v_scale = quantize_heads(k_TGE, v_TGE)
            pairs = [(kv.k[layer], k_TGE), (kv.v[layer], v_TGE)]
            pairs += [(kv.scales[0][layer], k_scale), (kv.scales[1][layer], v_scale)]
        for pages, new in pairs:
            pages.flatten(1, 2).index_copy_(1, slot_T, new.transpose(0, 1).to(pages.dtype))

    def prepare_layer(self, parts: LayerParts) -> None:
        return None

    def layers(self, x_TD: Tensor, prepared: Sequence[object], kv: KV, first: int, batch: Batch, plan: object) -> None:
        return None

    def plan(self, batch: Batch, kv: KV) -> TilePlan:
        return TilePlan(batch, kv.page_size)

    def attention(
        self, q_THE: Tensor, kv: KV, layer: int, plan: object, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        assert isinstance(kv, PagedKV) and isinstance(plan, TilePlan)
        if kv.scales is None:
            return attend(q_THE, *kv.layer(layer), plan, scale, window, softcap)
        q_mixed = mixed(q_THE) / run_of(q_THE.shape[2])
        return attend(q_mixed, *kv.layer(layer), plan, scale, window, softcap).to(q_THE.dtype)

    def silu_mul(self, x_T2D: Tensor) -> Tensor:
        """silu(first half) * second half of each row."""
        gate, up = x_T2D.float().chunk(2, dim=-1)
        return (gate / (1 + torch.exp(-gate)) * up).to(x_T2D.dtype)

    def gelu_mul(self, x_T2D: Tensor) -> Tensor:
        """gelu(first half) * second half of each row, gelu in its tanh form."""
        gate, up = x_T2D.float().chunk(2, dim=-1)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * (gate * gate * gate))
        return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(x_T2D.dtype)

    def largest(self, x_RV: Tensor) -> tuple[Tensor, Tensor]:
        index_R = x_RV.argmax(dim=1)
        return index_R, x_RV.gather(1, index_R[:, None])[:, 0]

    def forbid(self, x_RV: Tensor, row_K: Tensor, bits_KW: Tensor) -> None:
        place_32 = torch.arange(32, dtype=torch.int32, device=x_RV.device)
        allowed_KV = ((bits_KW[:, :, None] >> place_32) & 1).flatten(1)[:, : x_RV.shape[1]].bool()
        x_RV[row_K] = torch.where(allowed_KV, x_RV[row_K], -math.inf)

    def draw(self, x_RV: Tensor, draws: Draws) -> Tensor:
        return ref_sampling.draw(x_RV, draws)

    def score(self, x_RV: Tensor, row_S: Tensor, token_S: Tensor, top: int) -> Scores:
        return ref_sampling.score(x_RV, row_S, token_S, top)

    def move_blocks(self, kv: KV, moves_M3: Tensor) -> None:
        assert isinstance(kv, PagedKV)
        for src, dst, tokens in moves_M3.tolist():
            for pages in (kv.k, kv.v, *(kv.scales or ())):
                pages[:, :, dst, :tokens] = pages[:, :, src, :tokens]


def _attend_all(qkv_LW: Tensor, num_heads: int, scale: float) -> Tensor:
    """One sequence, every token of which attends to every other: [L, H * E]."""
    q, k, v = (part.unflatten(1, (num_heads, -1)).transpose(0, 1) for part in qkv_LW.float().chunk(3, dim=1))
    scores_HLL = torch.bmm(q, k.transpose(1, 2)) * scale
    weights_HLL = torch.exp(scores_HLL - scores_HLL.amax(dim=2, keepdim=True))
    out_HLE = torch.bmm(weights_HLL, v) / fold_sum(weights_HLL)[..., None]
    return out_HLE.transpose(0, 1).flatten(1).to(qkv_LW.dtype)
