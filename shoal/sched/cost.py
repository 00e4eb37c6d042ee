"""How long a step takes: linear in four things that decide it, or as measured. It must not know the clock or the
hardware's name."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
        return self._price(shape(step))

    def repeated(self, step: Step, count: int) -> list[float]:
        """Durations of the decode-only step and of those after it, each with every sequence a token further on."""
        one, tokens, read, pairs = shape(step)  # whole numbers all of them: sums of steps are exact
        return [self._price((one, tokens, read + k * tokens, pairs + k * tokens)) for k in range(count)]

    def _price(self, amounts: Shape) -> float:
        return sum(weight * x for weight, x in zip(self.weights, amounts, strict=True))


class Cost(Protocol):
    """Whatever can price a step."""

    def seconds(self, step: Step) -> float:
        """Predicted duration of the step."""
        ...


Curve = tuple[tuple[float, float], ...]  # (amount, seconds), amounts ascending; straight between points and beyond


def along(curve: Curve, amount: float) -> float:
    """Seconds of an amount. Below the first point a curve is flat: the least that anything takes."""
    if amount <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    high = min(max(bisect_left(curve, (amount, 0.0)), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[high - 1], curve[high]
    return y0 + (y1 - y0) * (amount - x0) / (x1 - x0)


class Parts(NamedTuple):
    """The seconds of a step by what they go to."""

    layers: float  # products of the layers with their weights, and what is done to each token beside them
    answers: float  # head, sampling, and the engine's own work, by rows that get a token
    attention: float


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """A step's duration from measurements of this machine with a model's own shapes."""

    layers: Curve  # by tokens of the step
    answers: Curve  # by rows that get a token
    pair: float  # of one query position with one key position, in all layers
    read: float  # of reading the keys and values of one position, in all layers
    start: float = 0.0  # of letting a row in
    score: float = 0.0  # of the likelihood of a prompt's token
    listed: float = 0.0  # of a block in the list of a sequence, whoever else lists it: planning and laying out
    opened: float = 0.0  # of a block of the prompt of a row that is let in
    block: int = 32  # positions of a block

    def parts(
        self, tokens: float, rows: float, pairs: float, read: float, starts: int = 0, scored: int = 0,
        listed: float = 0, opened: float = 0,
    ) -> Parts:  # fmt: skip
        """What a step of so many tokens takes; `rows` of them get a token, `read` positions are looked at, and of
        `scored` tokens the likelihood is wanted; its sequences list so many blocks, and the prompts of those that it
        lets in are `opened` blocks long."""
        answers = (along(self.answers, rows) if rows else 0.0) + self.start * starts + self.opened * opened
        answers += self.score * scored + self.listed * listed
        return Parts(along(self.layers, tokens), answers, self.pair * pairs + self.read * read)

    def seconds(self, step: Step) -> float:
        """Predicted duration of the step."""
        return sum(self.step_parts(step))

    def step_parts(self, step: Step) -> Parts:
        """What the step takes. A block that several rows look at is read once."""
        _, tokens, _, pairs = shape(step)
        rows = sum(1 for part in step.slices if part.want)
        scored = sum(part.want - 1 for part in step.slices if part.want > 1)
        blocks = {block for part in step.slices for block in part.blocks}
        listed = sum(len(part.blocks) for part in step.slices)
        most = sum(part.start + len(part.tokens) for part in step.slices)
        read = min(most, self.block * len(blocks))
        opened = sum(len(start.request.prompt) for start in step.starts) / self.block
        return self.parts(tokens, rows, pairs, read, len(step.starts), scored, listed, opened)
