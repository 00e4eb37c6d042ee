"""Attention over pages as the specification says it: fixed tiles of 16 query rows by 256 positions.

It knows which pages hold which positions, and must not know what the keys and values mean.

The rows of a sequence are its (token, head of the group) pairs for one key/value head; they are cut into tiles of 16,
the last one filled up. A position tile is four quarters of 64; each pair of a row tile and a quarter is one product of
fixed shape, whose rows do not depend on each other. So neither the company of a row nor its place in the tile can
change its bits. Sums over quarters and over tiles run from left to right, and what a row cannot see adds an exact zero
to them, so it makes no difference whether it is visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.api import Batch

TILE = 256  # positions of one partial
QUARTER = 64  # positions of one product
ROWS = 16  # query rows of one product
GATHER = 64  # pairs of row tile and quarter handled at once, so that keys and values stay in a core's cache
PRODUCTS = 32  # products of one call on a GPU, where the library chooses its method by their number


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys or values of one layer as [G, pages, P, E], with scales [G, pages, P] where they are whole numbers."""

    numbers: Tensor
    scales: Tensor | None = None

    def gather(self, units: Tensor) -> Tensor:
        """Those of the units as float32 [G, quarters, 64, E]."""
        num_kv, _, page_size, width = self.numbers.shape
        unit = min(page_size, QUARTER)
        found = self.numbers.view(num_kv, -1, unit, width).index_select(1, units).view(num_kv, -1, QUARTER, width)
        if self.scales is None:
            return found.float()
        scales = self.scales.view(num_kv, -1, unit).index_select(1, units)
        return found.float() * scales.view(num_kv, -1, QUARTER, 1)


@dataclass(frozen=True, slots=True)
class _Part:
    """Row tiles that meet the first C quarters of one position tile. A unit is a page, or a quarter of a larger one."""

    tiles_Q: Tensor  # which row tiles
    units: Tensor  # where the keys are, quarter by quarter, for each row tile in turn
    num_quarters: int
    hidden_QCRP: Tensor | None  # True where a row may not see a position; None when all is seen
    unwritten: Tensor  # positions where nothing has been written, counted over all row tiles


class TilePlan:
    """What a batch's attention visits, in order. Filled on first use for each (group size, window)."""

    def __init__(self, batch: Batch, page_size: int) -> None:
        self.device = batch.ids_T.device
        self.starts = batch.start_N1.tolist()
        self.lengths = batch.length_N.tolist()
        self.positions_T = batch.pos_T
        self.unit = min(page_size, QUARTER)
        per_page = page_size // self.unit
        parts = torch.arange(per_page, device=self.device)
        table_NU = (batch.table_NB.long()[..., None] * per_page + parts).flatten(1)
        self.table_NU = torch.nn.functional.pad(table_NU, (0, -table_NU.shape[1] % (TILE // self.unit)))
        self._rows: dict[int, _Rows] = {}
        self._parts: dict[tuple[int, int], list[_Part]] = {}

    def rows(self, group: int) -> _Rows:
        """The row tiles for `group` query heads per key/value head."""
        if group not in self._rows:
            self._rows[group] = _cut_rows(self, group)
        return self._rows[group]

    def parts(self, group: int, window: int) -> list[_Part]:
        """The work for one layer, position tiles ascending."""
        if (group, window) not in self._parts:
            self._parts[group, window] = _find_parts(self, self.rows(group), window)
        return self._parts[group, window]


@dataclass(frozen=True, slots=True)
class _Rows:
    index_QR: Tensor  # row of each tile place, counted token by token; filling places repeat the last row
    position_QR: Tensor  # its position
    place_M: Tensor  # where each row went, counted along index_QR
    sequence: list[int]  # sequence of each tile
    span: list[tuple[int, int]]  # first and last position of each tile


def _cut_rows(plan: TilePlan, group: int) -> _Rows:
    index: list[Tensor] = []
    place: list[Tensor] = []
    sequence: list[int] = []
    span: list[tuple[int, int]] = []
    for number, length in enumerate(plan.lengths):
        first, last = plan.starts[number] * group, plan.starts[number + 1] * group
        tiles = -(-(last - first) // ROWS)
        index.append(torch.arange(first, first + tiles * ROWS).clamp_(max=last - 1))
        place.append(torch.arange(last - first) + len(sequence) * ROWS)
        zero = length - (plan.starts[number + 1] - plan.starts[number])
        for tile in range(tiles):
            final = min((tile + 1) * ROWS, last - first) - 1
            span.append((zero + tile * ROWS // group, zero + final // group))
        sequence.extend([number] * tiles)
    index_QR = torch.cat(index).view(-1, ROWS).to(plan.device)
    position_QR = plan.positions_T[torch.div(index_QR, group, rounding_mode="floor")]
    return _Rows(index_QR, position_QR, torch.cat(place).to(plan.device), sequence, span)


def _find_parts(plan: TilePlan, rows: _Rows, window: int) -> list[_Part]:
    parts: list[_Part] = []
    for j in range(-(-max(plan.lengths) // TILE)):
        by_quarters: dict[int, list[int]] = {}
        for tile, (first, last) in enumerate(rows.span):
            if last >= j * TILE and not (window and first - window >= (j + 1) * TILE - 1):
                quarters = min(last - j * TILE, TILE - 1) // QUARTER + 1
                by_quarters.setdefault(quarters, []).append(tile)
        for quarters, tiles in by_quarters.items():
            step = GATHER // quarters
            for i in range(0, len(tiles), step):
                parts.append(_make_part(plan, rows, tiles[i : i + step], j, quarters, window))
    return parts


def _make_part(plan: TilePlan, rows: _Rows, tiles: list[int], j: int, quarters: int, window: int) -> _Part:
    begin, end = j * TILE, j * TILE + quarters * QUARTER
    device = plan.device
    tiles_Q = torch.tensor(tiles, device=device)
    owners = [rows.sequence[tile] for tile in tiles]
    units = plan.table_NU[torch.tensor(owners, device=device), begin // plan.unit : end // plan.unit]
    position_P = torch.arange(begin, end, device=device)
    hidden = None
    low, high = min(rows.span[t][0] for t in tiles), max(rows.span[t][1] for t in tiles)
    if low < end - 1 or (window and high - window >= begin):
        position_C1P = position_P.view(quarters, 1, QUARTER)
        position_Q1R1 = rows.position_QR[tiles_Q][:, None, :, None]
        hidden = position_C1P > position_Q1R1
        if window:
            hidden |= position_C1P <= position_Q1R1 - window
    length_Q1 = torch.tensor([plan.lengths[owner] for owner in owners], device=device)[:, None]
    unwritten = (position_P >= length_Q1).flatten().nonzero()[:, 0]
    return _Part(tiles_Q, units.flatten(), quarters, hidden, unwritten)


def attend(q_THE: Tensor, k: Stored, v: Stored, plan: TilePlan, scale: float, window: int, softcap: float) -> Tensor:
    """Attention of one layer. The result has the shape and dtype of q."""
    num_tokens, num_heads, width = q_THE.shape
    num_kv = k.numbers.shape[0]
    group = num_heads // num_kv
    rows = plan.rows(group)
    flat = q_THE.float().view(num_tokens, num_kv, group, width).transpose(0, 1).reshape(num_kv, -1, width)
    q = flat[:, rows.index_QR]  # [G, Q, 16, E]
    largest = torch.full(q.shape[:3], -torch.inf, device=q.device)
    weight = torch.zeros(q.shape[:3], device=q.device)
    out = torch.zeros_like(q)
    for part in plan.parts(group, window):
        tiles = part.tiles_Q
        top, mass, mixed = _partial(q[:, tiles], k, v, part, scale, softcap)
        before = largest[:, tiles]
        after = torch.maximum(before, top)
        base = torch.where(after == -torch.inf, 0.0, after)
        old, new = torch.exp(before - base), torch.exp(top - base)
        largest[:, tiles] = after
        weight[:, tiles] = weight[:, tiles] * old + mass * new
        out[:, tiles] = out[:, tiles] * old[..., None] + mixed * new[..., None]
    out = (out / weight[..., None]).flatten(1, 2)[:, rows.place_M]
    return out.view(num_kv, num_tokens, group, width).transpose(0, 1).reshape(q_THE.shape).to(q_THE.dtype)


def _partial(
    q_GQRE: Tensor, k: Stored, v: Stored, part: _Part, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score, sum of weights and weighted values of each row over one position tile."""
    num_kv, num_tiles, _, width = q_GQRE.shape
    split = (num_kv, num_tiles, part.num_quarters, ROWS, -1)
    keys, values = k.gather(part.units), v.gather(part.units)
    values.view(num_kv, -1, width).index_fill_(1, part.unwritten, 0.0)  # 0 * NaN would be NaN
    q = q_GQRE[:, :, None].expand(-1, -1, part.num_quarters, -1, -1).flatten(1, 2)
    scores_GQCRP = _products(q, keys.transpose(2, 3)).mul_(scale).view(split)
    if softcap:
        scores_GQCRP = torch.tanh(scores_GQCRP / softcap) * softcap
    if part.hidden_QCRP is not None:
        scores_GQCRP.masked_fill_(part.hidden_QCRP, -torch.inf)
    top = scores_GQCRP.amax((2, 4))
    base = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores_GQCRP - base[:, :, None, :, None])
    mixed = _products(weights.flatten(1, 2), values).view(split)
    return top, _left_to_right(fold_sum(weights)), _left_to_right(mixed)


def _left_to_right(x_GQC: Tensor) -> Tensor:
    """Sum over the third axis, in order."""
    total = x_GQC[:, :, 0]
    for quarter in range(1, x_GQC.shape[2]):
        total = total + x_GQC[:, :, quarter]
    return total


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[G, M, 16, X] by [G, M, X, Y]."""
    many_a, many_b = a.flatten(0, 1), b.flatten(0, 1)
    if a.is_cuda:
        pairs = zip(torch.split(many_a, PRODUCTS), torch.split(many_b, PRODUCTS), strict=True)
        out = torch.cat([_padded_bmm(x, y) for x, y in pairs])
    else:
        out = torch.bmm(many_a, many_b)
    return out.view(*a.shape[:3], b.shape[3])


def _padded_bmm(a: Tensor, b: Tensor) -> Tensor:
    count = a.shape[0]
    if count == PRODUCTS:
        return torch.bmm(a.contiguous(), b.contiguous())
    a = torch.cat([a, a.new_zeros(PRODUCTS - count, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(PRODUCTS - count, *b.shape[1:])])
    return torch.bmm(a, b)[:count]


def fold_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by adding its second half to its first until one number is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., 2 * half :]], dim=-1) if x.shape[-1] % 2 else folded
    return x[..., 0]
