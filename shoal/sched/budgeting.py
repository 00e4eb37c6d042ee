"""How many tokens a step may compute so that it lasts no longer than was promised.

It knows what a step costs and the width of the kernels' tiles; it must not know requests.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator

from shoal.core.types import TOKEN, Slice, Step
from shoal.sched.cost import Cost

NEAR = 0.03  # the smallest budget within this share of the best pace is taken: what is gained beyond it is not felt


def priced(cost: Cost, decodes: int, context: int, chunk: int, depth: int) -> float:
    """Seconds of a step of so many decodes, each behind `context` tokens, and a chunk of a prompt behind `depth`."""
    one, many = array(TOKEN, [0]), array(TOKEN, bytes(4 * chunk))
    slices = [Slice(0, context, one, (), 1)] * decodes  # alike, and only to be priced: one object stands for all
    if chunk:
        slices.append(Slice(decodes, depth, many, (), 1))
    return cost.seconds(Step(1, tuple(slices)))


def multiples(tile: int, most: int) -> Iterator[int]:
    """Multiples of `tile` up to `most`, all of the first eight and then eight in each doubling; `most` where it is
    less than one tile."""
    if most < tile:
        yield most
    times, step = 1, 1
    while times * tile <= most:
        yield times * tile
        step *= 2 if times >= 16 * step else 1
        times += step


def select_budget(cost: Cost, gap: float, decodes: int, context: int, depth: int, tile: int, most: int) -> int:
    """Sarathi-Serve's token budget (arXiv 2403.02310): of the multiples of `tile` whose step, with all decodes in it,
    ends within `gap` seconds, the one that computes prompts fastest. 0 when even the smallest takes longer.

    The decodes are part of it, so that all products are whole tiles. `context` is what each of them is behind, `depth`
    what the prompt's chunk is behind."""
    feasible: list[tuple[int, float]] = []
    for tokens in multiples(tile, most):
        if tokens <= decodes:
            continue
        seconds = priced(cost, decodes, context, tokens - decodes, depth)
        if seconds > gap:
            break
        feasible.append((tokens, (tokens - decodes) / max(seconds, 1e-12)))
    best = max((pace for _, pace in feasible), default=0.0)
    return next((tokens for tokens, pace in feasible if pace >= (1.0 - NEAR) * best), 0)


def saturation(cost: Cost, tile: int, most: int) -> int:
    """The least tokens of which twice as many take almost twice as long: DistServe's limit of a batch of prompts
    (arXiv 2401.09670), and the least chunk that SARATHI should cut."""
    for tokens in multiples(tile, most):
        if priced(cost, 0, 0, 2 * tokens, 0) >= 1.9 * priced(cost, 0, 0, tokens, 0):
            return tokens
    return most


class Budgets:
    """`select_budget`, asked in every step: what was found for like steps is kept. The number of decodes, their
    context and the prompt's depth are rounded up, by a quarter at most, so that what is kept is never too much."""

    def __init__(self, cost: Cost, tile: int, most: int) -> None:
        self.cost, self.tile, self.most = cost, tile, most
        self._found: dict[tuple[float, int, int, int], int] = {}

    def tokens(self, gap: float, decodes: int, context: int, depth: int) -> int:
        """Tokens of a step that may take `gap` seconds: always more than the decodes, for a promise that cannot be
        kept is no reason that no prompt is ever computed."""
        if math.isinf(gap):
            return self.most
        key = gap, rounded(decodes, 8), rounded(context, 4), rounded(depth, 8)
        if key not in self._found:
            self._found[key] = select_budget(self.cost, *key, self.tile, self.most)
        return max(self._found[key], (decodes // self.tile + 1) * self.tile)


def rounded(count: int, parts: int) -> int:
    """`count` rounded up to one of so many places in each doubling."""
    if count <= parts:
        return count
    place = 1 << (count.bit_length() - parts.bit_length())
    return -(-count // place) * place
