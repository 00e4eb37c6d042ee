"""Attention over pages as the specification says it: fixed tiles of 16 query rows by 256 positions.

It knows which pages hold which positions, and must not know what the keys and values mean.

The rows of a sequence are its (token, head of the group) pairs for one key/value head; they are cut into tiles of 16,
the last one filled up. Each pair of a row tile and a position tile is one product of fixed shape, whose rows do not
depend on each other. So neither the company of a row nor its place in the tile can change its bits. A position tile
that a row cannot see leaves the row's fold exactly as it was, so it makes no difference whether it is visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.api import Batch

TILE = 256  # positions of one partial
ROWS = 16  # query rows of one product
GATHER = 16  # row tiles handled at once, so that their keys and values stay in a core's cache
PRODUCTS = 32  # products of one call on a GPU, where the library chooses its method by their number


@dataclass(frozen=True, slots=True)
class _Part:
    """Row tiles that meet one position tile."""

    tiles_Q: Tensor  # which row tiles
    pages_B: Tensor  # the pages of the position tile, for each row tile in turn
    hidden_QRP: Tensor | None  # True where a row may not see a position; None when all is seen
    unwritten: Tensor  # positions where nothing has been written, counted over all row tiles


class TilePlan:
    """What a batch's attention visits, in order. Filled on first use for each (group size, window)."""

    def __init__(self, batch: Batch, page_size: int) -> None:
        self.device = batch.ids_T.device
        self.starts = batch.start_N1.tolist()
        self.lengths = batch.length_N.tolist()
        self.positions_T = batch.pos_T
        per_tile = TILE // page_size
        table = batch.table_NB
        self.table_NB = torch.nn.functional.pad(table, (0, -table.shape[1] % per_tile)).long()
        self.per_tile = per_tile
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
    parts = []
    for j in range(-(-max(plan.lengths) // TILE)):
        seen = [
            tile
            for tile, (first, last) in enumerate(rows.span)
            if last >= j * TILE and not (window and first - window >= (j + 1) * TILE - 1)
        ]
        parts.extend(_make_part(plan, rows, seen[i : i + GATHER], j, window) for i in range(0, len(seen), GATHER))
    return parts


def _make_part(plan: TilePlan, rows: _Rows, tiles: list[int], j: int, window: int) -> _Part:
    begin, end = j * TILE, (j + 1) * TILE
    device = plan.device
    tiles_Q = torch.tensor(tiles, device=device)
    owners = [rows.sequence[tile] for tile in tiles]
    pages_QB = plan.table_NB[torch.tensor(owners, device=device), j * plan.per_tile : (j + 1) * plan.per_tile]
    position_P = torch.arange(begin, end, device=device)
    hidden = None
    low, high = min(rows.span[t][0] for t in tiles), max(rows.span[t][1] for t in tiles)
    if low < end - 1 or (window and high - window >= begin):
        position_QR1 = rows.position_QR[tiles_Q][..., None]
        hidden = position_P > position_QR1
        if window:
            hidden |= position_P <= position_QR1 - window
    length_Q1 = torch.tensor([plan.lengths[owner] for owner in owners], device=device)[:, None]
    unwritten = (position_P >= length_Q1).flatten().nonzero()[:, 0]
    return _Part(tiles_Q, pages_QB.flatten(), hidden, unwritten)


def attend(q_THE: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float, window: int, softcap: float) -> Tensor:
    """Attention of one layer; k and v are [G, pages, P, E]. The result has the shape and dtype of q."""
    num_tokens, num_heads, width = q_THE.shape
    num_kv = k.shape[0]
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
    q: Tensor, k: Tensor, v: Tensor, part: _Part, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score, sum of weights and weighted values of each row over one position tile."""
    keys = _gather(k, part.pages_B)
    values = _gather(v, part.pages_B)
    values.flatten(1, 2).index_fill_(1, part.unwritten, 0.0)  # 0 * NaN would be NaN
    scores = _products(q, keys.transpose(2, 3)).mul_(scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if part.hidden_QRP is not None:
        scores.masked_fill_(part.hidden_QRP, -torch.inf)
    top = scores.amax(-1)
    weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top)[..., None])
    return top, fold_sum(weights), _products(weights, values)


def _gather(pages: Tensor, index_B: Tensor) -> Tensor:
    """Rows of pages as float32 [G, Q, 256, E]."""
    found = pages.index_select(1, index_B)
    return found.view(pages.shape[0], -1, TILE, pages.shape[-1]).float()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """[G, Q, 16, X] by [G, Q, X, Y]."""
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
