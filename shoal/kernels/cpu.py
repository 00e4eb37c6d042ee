"""The compiled kernels behind tensors: checks shapes, allocates results, passes addresses to the extension.

It knows which memory belongs to whom. It must not know the arithmetic or the layouts (csrc does), nor any other part
of the package.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.kernels import _cpu
from shoal.kernels.api import KV, Activation, Batch, Delta, Draws, Heads, LayerParts, Mode, Scores
from shoal.kernels.cpu_deltas import Grouped, PackedDeltas
from shoal.kernels.cpu_layers import PackedLinear, PreparedHeads, PreparedLayer, prepare_layer
from shoal.kernels.cpu_within import attend_within
from shoal.kernels.quantize import WIDEST, Quantized, pieces, quantize

UNIT = 16  # positions: a page holds whole units
PANEL = 32  # outputs of a weight that lie together; values of a head are filled up to it
TILE = 256  # positions of one partial of attention

_KINDS = {torch.float32: _cpu.Kind.FP32, torch.bfloat16: _cpu.Kind.BF16}
_PAGE_KINDS = {**_KINDS, torch.int8: _cpu.Kind.INT8}
_DRAW_TYPES = [
    torch.int64, torch.int64, torch.float32, torch.float32, torch.int64, torch.float64, torch.float32
]  # fmt: skip
_QUANTIZED = {
    "int8": _cpu.Kind.INT8, "int8-a16": _cpu.Kind.INT8_A16, "int4": _cpu.Kind.INT4, "int4-a16": _cpu.Kind.INT4_A16,
}  # fmt: skip
_GATES = {"silu": _cpu.Gate.SILU, "gelu": _cpu.Gate.GELU}


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets this machine can run, best first; the last is always "scalar"."""
    return tuple(_cpu.names())


def choose(environment: Mapping[str, str]) -> str:
    """The instruction set to use: SHOAL_ISA when it is set (a ValueError when the machine lacks it), else the best."""
    here = instruction_sets()
    wanted = environment.get("SHOAL_ISA", "")
    if wanted and wanted not in here:
        raise ValueError(
            f"SHOAL_ISA={wanted}, but this machine runs only {', '.join(here)}: unset it or name one of these"
        )
    return wanted or here[0]


class UnitKV:
    """Keys and values in pages of units of 16 positions, one tensor of bytes for each layer."""

    def __init__(
        self, memory: Tensor, pages: list[_cpu.Pages], num_pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        self.memory = memory  # [L, 2, bytes]
        self.pages = pages
        self.num_pages = num_pages
        self.page_size = page_size
        self.activations = torch.bfloat16 if dtype == torch.int8 else dtype


def _aligned(size: int) -> Tensor:
    """Bytes that begin where a page of the system's memory does: a block of 4 KB is then in one of them, not in two."""
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size]


@dataclass(slots=True)
class SharedPlan:
    """What the extension found in a step's page tables, and memory for what runs hand on."""

    plan: _cpu.Plan
    num_tokens: int
    states: Tensor | None = field(default=None)

    def states_for(self, num_heads: int, width: int) -> int:
        """The address of the states of runs, of so many heads of that width."""
        if self.states is None:
            numbers = self.num_tokens * num_heads * (width + -width % PANEL + 2) if self.plan.num_levels > 1 else 0
            self.states = torch.empty(numbers)
        return self.states.data_ptr()


class CpuKernels:
    """`Kernels` of one instruction set. Tensors are contiguous, on the CPU, fp32 or bf16 throughout a call."""

    def __init__(self, name: str, share: bool = True) -> None:
        """`share` off reads a shared run once for each of its rows: the control of the same bits."""
        self.device = torch.device("cpu")
        _cpu.set_threads(torch.get_num_threads())
        self._table = _cpu.Table(name)
        self._share = share

    @property
    def name(self) -> str:
        """The instruction set."""
        return self._table.name

    def kv_bytes(self, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * page_size * num_kv_heads * ((head_dim + -head_dim % PANEL) * dtype.itemsize + scale)

    def new_kv(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> UnitKV:
        if page_size <= 0 or page_size % UNIT or TILE % page_size:
            raise ValueError(f"page size {page_size} is not one of 16, 32, 64, 128, 256")
        if dtype == torch.int8 and head_dim > WIDEST:
            raise ValueError(f"heads of {head_dim} numbers cannot be kept as int8: {WIDEST} are the most")
        half = num_pages * self.kv_bytes(page_size, num_kv_heads, head_dim, dtype) // 2
        # Not zeroed: memory is then taken from the system page by page, as it is first written.
        memory = _aligned(num_layers * 2 * half).view(num_layers, 2, half)
        pages = [
            _cpu.Pages(
                memory[layer, 0].data_ptr(), memory[layer, 1].data_ptr(), num_pages, page_size, num_kv_heads, head_dim,
                _PAGE_KINDS[dtype],
            )
            for layer in range(num_layers)
        ]  # fmt: skip
        return UnitKV(memory, pages, num_pages, page_size, dtype)

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None = None, mode: Mode = "plain") -> PackedLinear:
        return self._pack(weight_NK, bias_N, len(weight_NK), _cpu.Gate.NONE, mode)

    def pack_gated(
        self, weight_2FK: Tensor, bias_2F: Tensor | None = None, activation: Activation = "silu", mode: Mode = "plain"
    ) -> PackedLinear:
        bias = None if bias_2F is None else _alternating(bias_2F[:, None])[:, 0]
        return self._pack(_alternating(weight_2FK), bias, len(weight_2FK) // 2, _GATES[activation], mode)

    def _pack(
        self, weight_NK: Tensor, bias_N: Tensor | None, outputs: int, gate: _cpu.Gate, mode: Mode
    ) -> PackedLinear:
        n, k = weight_NK.shape
        scales: tuple[Tensor, ...] = ()
        if mode == "plain":
            kind, dtype, values, group = _KINDS[weight_NK.dtype], weight_NK.dtype, weight_NK.contiguous(), 0
        else:
            quantized = quantize(weight_NK, mode)
            kind, dtype, values, group = _QUANTIZED[mode], torch.bfloat16, quantized.values_NK, quantized.group
            scales = _scales(quantized)
        panels = torch.empty(self._table.packed_bytes(kind, n, k), dtype=torch.uint8)
        self._table.pack(kind, values.data_ptr(), panels.data_ptr(), n, k)
        bias = torch.zeros(n + -n % PANEL)
        if bias_N is not None:
            bias[:n] = bias_N
        scale, zero = (each.data_ptr() for each in scales) if scales else (0, 0)
        gated = gate != _cpu.Gate.NONE
        narrow, wide = (
            _cpu.Linear(
                self._table, kind, gate if not wide else _cpu.Gate.NONE, n, k, group, panels.data_ptr(), scale=scale,
                zero=zero, bias=bias.data_ptr() if bias_N is not None else 0, wide=wide,
                outputs=n if wide and gated else outputs,
            )
            for wide in (False, True)
        )  # fmt: skip
        return PackedLinear(narrow, wide, gated, dtype, k, outputs, (panels, bias, *scales))

    def linear(self, x_TK: Tensor, packed: object, residual_TN: Tensor | None = None, factor: float = 1.0) -> Tensor:
        assert isinstance(packed, PackedLinear)
        rows, inputs = x_TK.shape
        assert inputs == packed.inputs and x_TK.dtype == packed.dtype and x_TK.is_contiguous(), (x_TK.shape, packed)
        if residual_TN is None:
            out_TN = torch.empty((rows, packed.outputs), dtype=x_TK.dtype)
            packed.narrow(x_TK.data_ptr(), rows, 0, factor, out_TN.data_ptr())
            return out_TN
        assert residual_TN.shape == (rows, packed.outputs), (residual_TN.shape, packed)
        assert residual_TN.dtype == x_TK.dtype and residual_TN.is_contiguous(), residual_TN.dtype
        out = residual_TN.data_ptr()
        packed.narrow(x_TK.data_ptr(), rows, out, factor, out)
        return residual_TN

    def gated(self, x_TK: Tensor, packed: object) -> Tensor:
        return self.linear(x_TK, packed)

    def pack_deltas(self, deltas: Sequence[Delta | None], packed: object) -> PackedDeltas:
        assert isinstance(packed, PackedLinear)
        found = PackedDeltas(_cpu.Deltas(self._table), packed.inputs, packed.outputs, packed.gated)
        for delta in deltas:
            found.append(delta, self.pack)
        return found

    def group(self, adapter_T: Tensor) -> Grouped:
        return Grouped(adapter_T)

    def add_deltas(self, x_TK: Tensor, y_TN: Tensor, deltas: object, grouped: object, factor: float = 1.0) -> None:
        assert isinstance(deltas, PackedDeltas) and isinstance(grouped, Grouped)
        assert x_TK.shape == (grouped.num_rows, deltas.inputs) and x_TK.is_contiguous(), (x_TK.shape, deltas)
        assert y_TN.shape == (grouped.num_rows, deltas.columns) and y_TN.is_contiguous(), (y_TN.shape, deltas)
        wide = y_TN.dtype == torch.float32
        deltas.deltas.add(grouped.rows, x_TK.data_ptr(), len(x_TK), y_TN.data_ptr(), deltas.columns, wide, factor)

    def gated_with(self, x_TK: Tensor, packed: object, deltas: object, grouped: object) -> Tensor:
        assert isinstance(packed, PackedLinear) and isinstance(deltas, PackedDeltas) and isinstance(grouped, Grouped)
        rows, inputs = x_TK.shape
        assert inputs == packed.inputs and x_TK.dtype == packed.dtype and x_TK.is_contiguous(), (x_TK.shape, packed)
        assert rows == grouped.num_rows, (x_TK.shape, grouped)
        memory = grouped.memory(min(rows, deltas.deltas.gated_rows(deltas.columns)) * deltas.columns)
        out_TF = torch.empty((rows, packed.outputs), dtype=x_TK.dtype)
        deltas.deltas.gated(
            packed.narrow, packed.wide, grouped.rows, x_TK.data_ptr(), rows, memory.data_ptr(), out_TF.data_ptr()
        )
        return out_TF

    def logits(self, x_RD: Tensor, packed: object) -> Tensor:
        assert isinstance(packed, PackedLinear) and not packed.gated
        rows, inputs = x_RD.shape
        assert inputs == packed.inputs and x_RD.dtype == packed.dtype and x_RD.is_contiguous(), (x_RD.shape, packed)
        out_RV = torch.empty((rows, packed.outputs))
        packed.wide(x_RD.data_ptr(), rows, 0, 1.0, out_RV.data_ptr())
        return out_RV

    def embedding(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        # Not by torch: it would wake threads of its own to copy a few rows, which takes longer than a layer's norms.
        (count, width), out_TD = weight_VD.shape, torch.empty((len(ids_T), weight_VD.shape[1]), dtype=weight_VD.dtype)
        assert weight_VD.is_contiguous() and ids_T.is_contiguous() and ids_T.dtype == torch.int64, ids_T.dtype
        row = width * weight_VD.element_size()
        self._table.gather(weight_VD.data_ptr(), count, row, ids_T.data_ptr(), len(ids_T), out_TD.data_ptr())
        return out_TD

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        columns = x_TD.shape[-1]
        assert weight_D.shape == (columns,) and weight_D.dtype == torch.float32, (x_TD.shape, weight_D.shape)
        assert x_TD.is_contiguous() and weight_D.is_contiguous(), "tensors must be contiguous"
        out_TD = torch.empty_like(x_TD)
        wide = x_TD.dtype == torch.float32
        rows = x_TD.numel() // columns
        self._table.rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), rows, columns, eps, wide)
        return out_TD

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        columns = x_TD.shape[-1]
        assert weight_D.shape == bias_D.shape == (columns,) and x_TD.is_contiguous(), (x_TD.shape, weight_D.shape)
        assert weight_D.dtype == bias_D.dtype == torch.float32, (weight_D.dtype, bias_D.dtype)
        out_TD = torch.empty_like(x_TD)
        addresses = (each.data_ptr() for each in (x_TD, weight_D, bias_D, out_TD))
        self._table.layer_norm(*addresses, x_TD.numel() // columns, columns, eps, x_TD.dtype == torch.float32)
        return out_TD

    def gelu(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(), "tensors must be contiguous"
        self._table.gelu(x.data_ptr(), x.data_ptr(), x.numel(), x.dtype == torch.float32)
        return x

    def attention_within(self, qkv_TW: Tensor, num_heads: int, lengths: Sequence[int], scale: float) -> Tensor:
        return attend_within(qkv_TW, num_heads, lengths, scale)

    def add(self, x_TD: Tensor, branch_TD: Tensor, factor: float = 1.0) -> Tensor:
        assert x_TD.shape == branch_TD.shape and x_TD.dtype == branch_TD.dtype, (x_TD.shape, branch_TD.shape)
        assert x_TD.is_contiguous() and branch_TD.is_contiguous(), "tensors must be contiguous"
        out_TD = torch.empty_like(x_TD)
        wide = x_TD.dtype == torch.float32
        self._table.add(x_TD.data_ptr(), branch_TD.data_ptr(), factor, out_TD.data_ptr(), x_TD.numel(), wide)
        return out_TD

    def prepare_heads(self, heads: Heads) -> PreparedHeads:
        table = tuple(part.contiguous() for part in heads.table or ())
        norms = tuple(part.contiguous() for part in heads.norms or ())
        assert all(part.dtype == torch.float32 for part in (*table, *norms)), "tables and norms are float32"
        cosine, sine = (part.data_ptr() for part in table) if table else (0, 0)
        query, key = (part.data_ptr() for part in norms) if norms else (0, 0)
        rotated = table[0].shape[1] if table else 0
        prepared = _cpu.Heads(heads.num_heads, rotated, cosine, sine, query, key, heads.eps, heads.whole)
        return PreparedHeads(prepared, heads, (*table, *norms))

    def place(self, qkv_TW: Tensor, prepared: object, kv: KV, layer: int, batch: Batch) -> Tensor:
        assert isinstance(prepared, PreparedHeads) and isinstance(kv, UnitKV)
        about, (tokens, width) = prepared.about, qkv_TW.shape
        assert width == (about.num_heads + 2 * about.num_kv_heads) * about.head_dim, (qkv_TW.shape, about)
        assert qkv_TW.is_contiguous() and qkv_TW.dtype == kv.activations, (qkv_TW.dtype, kv.activations)
        self._table.place(
            qkv_TW.data_ptr(), prepared.heads, kv.pages[layer], batch.pos_T.data_ptr(), batch.slot_T.data_ptr(), tokens
        )
        return qkv_TW.as_strided((tokens, about.num_heads, about.head_dim), (width, about.head_dim, 1))

    def plan(self, batch: Batch, kv: KV) -> SharedPlan:
        rows, row_length = batch.table_NB.shape
        assert batch.table_NB.is_contiguous(), "the table must be contiguous"
        plan = _cpu.Plan(
            batch.start_N1.data_ptr(), batch.length_N.data_ptr(), batch.table_NB.data_ptr(), rows, row_length,
            kv.page_size, kv.num_pages, self._share,
        )  # fmt: skip
        return SharedPlan(plan, len(batch.ids_T))

    def attention(
        self, q_THE: Tensor, kv: KV, layer: int, plan: object, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        assert isinstance(kv, UnitKV) and isinstance(plan, SharedPlan)
        tokens, num_heads, width = q_THE.shape
        assert tokens == plan.num_tokens and q_THE.stride()[1:] == (width, 1), (q_THE.shape, q_THE.stride())
        assert q_THE.dtype == kv.activations and scale > 0, (q_THE.dtype, kv.activations, scale)
        out_THE = torch.empty((tokens, num_heads, width), dtype=q_THE.dtype)
        self._table.attention(
            plan.plan, kv.pages[layer], q_THE.data_ptr(), q_THE.stride(0), num_heads, scale, window, softcap,
            plan.states_for(num_heads, width), out_THE.data_ptr(),
        )  # fmt: skip
        return out_THE

    def prepare_layer(self, parts: LayerParts) -> PreparedLayer:
        return prepare_layer(self._table, parts)

    def layers(
        self, x_TD: Tensor, prepared: Sequence[object], kv: KV, first: int, batch: Batch, plan: object
    ) -> Tensor:
        assert isinstance(kv, UnitKV) and isinstance(plan, SharedPlan)
        whole, tokens = [each for each in prepared if isinstance(each, PreparedLayer)], len(x_TD)
        pages, heads = kv.pages[first : first + len(whole)], whole[0].about.about
        assert len(whole) == len(prepared) == len(pages), (len(prepared), first, len(kv.pages))
        assert x_TD.shape == (plan.num_tokens, whole[0].width) and x_TD.is_contiguous(), (x_TD.shape, whole[0])
        assert x_TD.dtype == kv.activations, (x_TD.dtype, kv.activations)
        layers = [each.layer for each in whole]
        memory = torch.empty(max(each.memory(tokens) for each in layers), dtype=torch.uint8)  # of the widest
        _cpu.run_layers(
            layers, plan.plan, pages, x_TD.data_ptr(), tokens, batch.pos_T.data_ptr(), batch.slot_T.data_ptr(),
            memory.data_ptr(), plan.states_for(heads.num_heads, heads.head_dim),
        )  # fmt: skip
        return x_TD

    def largest(self, x_RV: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x_RV.shape
        assert x_RV.dtype == torch.float32 and x_RV.is_contiguous(), x_RV.dtype
        index_R, value_R = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self._table.largest(x_RV.data_ptr(), index_R.data_ptr(), value_R.data_ptr(), rows, columns)
        return index_R, value_R

    def forbid(self, x_RV: Tensor, row_K: Tensor, bits_KW: Tensor) -> None:
        columns, count = x_RV.shape[1], len(row_K)
        assert x_RV.dtype == torch.float32 and x_RV.is_contiguous(), x_RV.dtype
        assert row_K.dtype == torch.int64 and row_K.is_contiguous(), row_K.dtype
        assert bits_KW.dtype == torch.int32 and bits_KW.is_contiguous(), bits_KW.dtype
        assert bits_KW.shape == (count, (columns + 31) // 32), (bits_KW.shape, count, columns)
        self._table.forbid(x_RV.data_ptr(), columns, row_K.data_ptr(), bits_KW.data_ptr(), count)

    def draw(self, x_RV: Tensor, draws: Draws) -> Tensor:
        assert x_RV.dtype == torch.float32 and x_RV.is_contiguous(), x_RV.dtype
        token_S = torch.empty_like(draws.row_S)
        fields = (draws.row_S, draws.number_S, draws.best_S, draws.heat_S, draws.top_k_S, draws.top_p_S, draws.min_p_S)
        assert [each.dtype for each in fields] == _DRAW_TYPES, draws
        assert all(len(each) == len(token_S) and each.is_contiguous() for each in fields), draws
        addresses = [each.data_ptr() for each in fields]
        self._table.draw(x_RV.data_ptr(), x_RV.shape[1], len(token_S), *addresses, token_S.data_ptr())
        return token_S

    def score(self, x_RV: Tensor, row_S: Tensor, token_S: Tensor, top: int) -> Scores:
        assert x_RV.dtype == torch.float32 and x_RV.is_contiguous(), x_RV.dtype
        assert row_S.dtype == token_S.dtype == torch.int64 and row_S.is_contiguous() and token_S.is_contiguous()
        count, columns = len(row_S), x_RV.shape[1]
        assert len(token_S) == count and 0 <= top <= columns, (row_S.shape, token_S.shape, top)
        floats, integers = torch.empty((2, count)), torch.empty((2, count), dtype=torch.int64)
        ids, values = torch.empty((count, top), dtype=torch.int64), torch.empty((count, top))
        found = Scores(floats[0], floats[1], integers[0], integers[1], ids, values)
        self._table.score(
            x_RV.data_ptr(), columns, count, top, row_S.data_ptr(), token_S.data_ptr(),
            *(part.data_ptr() for part in (*floats, *integers, ids, values)),
        )  # fmt: skip
        return found

    def move_blocks(self, kv: KV, moves_M3: Tensor) -> None:
        assert isinstance(kv, UnitKV)
        for pages in kv.pages:
            self._table.move(pages, moves_M3.data_ptr(), len(moves_M3))


def _alternating(both_2FK: Tensor) -> Tensor:
    """Panels of the first half and of the second in turn; both are filled up with zeros to whole panels."""
    half, columns = len(both_2FK) // 2, both_2FK.shape[1]
    panels = torch.empty((half + -half % PANEL) // PANEL, 2, PANEL, columns, dtype=both_2FK.dtype)
    for side in range(2):
        part = both_2FK[side * half : (side + 1) * half]
        if half % PANEL:
            part = torch.nn.functional.pad(part, (0, 0, 0, -half % PANEL))
        panels[:, side] = part.view(-1, PANEL, columns)
    return panels.view(-1, columns)


def _scales(weight: Quantized) -> tuple[Tensor, Tensor]:
    """An output's scale and what stands for its zero, filled up to whole panels: for int8 float32 [panels * 32], the
    zero being the sum of its numbers, as activations are multiplied 128 too high; else [panels, groups, 32]."""
    scale_NC = weight.scale_NC
    zero_NC = _row_sums(weight.values_NK) if weight.zero_NC is None else weight.zero_NC
    fill = (0, 0, 0, -len(scale_NC) % PANEL)
    scale, zero = (
        torch.nn.functional.pad(each, fill).view(-1, PANEL, each.shape[1]).transpose(1, 2).contiguous()
        for each in (scale_NC, zero_NC)
    )
    return scale, zero


def _row_sums(values_NK: Tensor) -> Tensor:
    """Sums of int8 rows as float32 [N, 1]. Each partial sum is a whole number that float32 holds up to K = 132,000."""
    return torch.cat([part.float().sum(1, keepdim=True) for part in pieces(values_NK)])
