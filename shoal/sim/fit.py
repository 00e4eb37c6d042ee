"""Costs learnt from steps that were timed: sums of what decides a step, and searches for a few parameters.

It knows arithmetic only; it must not know who timed a step, on what, or why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shoal.core.types import Step
from shoal.sched.cost import LinearCost, shape

Vector = np.ndarray


class Timed(NamedTuple):
    """A step that was run, by what decides how long it takes, and how long it took."""

    tokens: float  # computed
    read: float  # positions looked at
    pairs: float  # of a query's position with a key's
    rows: float  # that got a token
    starts: float  # rows let in
    seconds: float


def timed(step: Step, seconds: float) -> Timed:
    """What of the step decides, and its seconds."""
    _, tokens, read, pairs = shape(step)
    rows = sum(part.want > 0 for part in step.slices)
    return Timed(tokens, read, pairs, rows, len(step.starts), seconds)


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Seconds per step and by each of `Timed`'s amounts; a step has at least the seconds of the first."""

    step: float
    token: float
    read: float
    pair: float
    row: float
    start: float

    def seconds(self, step: Step) -> float:
        """Predicted duration of the step."""
        found = timed(step, 0.0)
        return self.step + self.token * found.tokens + self.read * found.read + self.pair * found.pairs + (
            self.row * found.rows + self.start * found.starts
        )  # fmt: skip


def fit_cost(steps: Iterable[Timed]) -> FittedCost:
    """Least squares over the steps, no amount taking less than nothing."""
    amounts, seconds = _columns(steps)
    return FittedCost(*map(float, nonnegative(amounts, seconds)))


def fit_linear(steps: Iterable[Timed]) -> LinearCost:
    """The same with the four amounts of `sched.cost.LinearCost`."""
    amounts, seconds = _columns(steps)
    found = nonnegative(amounts[:, :4], seconds)
    return LinearCost((float(found[0]), float(found[1]), float(found[2]), float(found[3])))


def _columns(steps: Iterable[Timed]) -> tuple[Vector, Vector]:
    table = np.array(list(steps), dtype=np.float64)
    if not len(table):
        raise ValueError("no steps to learn from: give at least one")
    return np.column_stack([np.ones(len(table)), table[:, :-1]]), table[:, -1]


def nonnegative(amounts: Vector, seconds: Vector) -> Vector:
    """The weights, none below nothing, whose sums come closest: Lawson and Hanson's active set (1974)."""
    scale = np.linalg.norm(amounts, axis=0)
    scale[scale == 0.0] = 1.0
    matrix = amounts / scale
    weights, free = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=bool)
    least = 1e-10 * max(float(np.abs(matrix.T @ seconds).max()), 1e-300)
    for _ in range(30 * matrix.shape[1]):
        pull = np.where(free, -np.inf, matrix.T @ (seconds - matrix @ weights))
        if free.all() or pull.max() <= least:
            break
        free[int(pull.argmax())] = True
        while True:
            found = np.zeros_like(weights)
            found[free] = np.linalg.lstsq(matrix[:, free], seconds, rcond=None)[0]
            below = free & (found <= 0.0)
            if not below.any():
                weights = found
                break
            reach = float((weights[below] / (weights[below] - found[below])).min())
            weights = weights + reach * (found - weights)
            free &= weights > 1e-15
    found = weights / scale
    return np.asarray(found)


def search(
    loss: Callable[[Mapping[str, float]], float], start: Mapping[str, float], most: Mapping[str, float],
    rounds: int = 60,
) -> dict[str, float]:  # fmt: skip
    """Positive parameters of least loss near `start`: one after the other is made larger or smaller by a factor, which
    shrinks where neither helps. None grows beyond its `most`."""
    here, factors = dict(start), dict.fromkeys(start, 1.2)
    least = loss(here)
    for _ in range(rounds):
        for name, factor in factors.items():
            for times in (factor, 1 / factor):
                there = here | {name: min(here[name] * times, most.get(name, float("inf")))}
                if (found := loss(there)) < least:
                    here, least = there, found
                    break
            else:
                factors[name] = factor**0.5
        if max(factors.values()) < 1.001:
            break
    return here
