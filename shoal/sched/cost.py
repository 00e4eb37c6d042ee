"""How long a step takes: linear in four things that decide it. It must not know the clock or the hardware's name."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.types import Step

Shape = tuple[float, float, float, float]


def shape(step: Step) -> Shape:
    """(1, tokens computed, cached tokens read, query-key pairs)."""
    tokens = read = pairs = 0.0
    for part in step.slices:
        count = len(part.tokens) + part.draft
        tokens += count
        read += part.start + count
        pairs += count * (part.start + (count + 1) / 2)
    return 1.0, tokens, read, pairs


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds per step, token, cached token read and query-key pair."""

    weights: Shape = (4e-3, 2e-5, 5e-8, 1e-10)

    def seconds(self, step: Step) -> float:
        """Predicted duration of the step."""
        return sum(weight * x for weight, x in zip(self.weights, shape(step), strict=True))
