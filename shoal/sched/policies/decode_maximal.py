"""Decode-maximal batches: one chunk of one prompt in each step, and as many decodes as ride on it.

It knows the means of prompts and answers so far; it must not know how long the next answer will be.
SARATHI (arXiv 2308.16369). In a steady state the P / C chunks of a prompt carry (B - 1) decodes each, and an answer
needs D of them: so the chunk at which neither runs out first is C = (B - 1) P / D.
"""

from __future__ import annotations

import math

from shoal.core.sequence import Sequence
from shoal.core.types import Finish
from shoal.sched.admission import Admission
from shoal.sched.policies.serving import Serving
from shoal.sched.policy import Budget, Reach, View

FORGET = 0.05  # weight of the latest answer in the means


class DecodeMaximal(Serving):
    """B is `limit.sequences`, or of a model in stages a step's share of them.

    `chunk_tokens` fixes C; else it follows the means, between `least` and the limit.
    """

    items = 1

    def __init__(
        self, limit: Budget | None = None, admission: Admission | None = None, chunk_tokens: int | None = None,
        tile: int = 128, least: int = 256,
    ) -> None:  # fmt: skip
        """`least` is where a chunk keeps the machine busy: see `saturation`."""
        super().__init__(limit or Budget(2048, 32), admission)
        self.chunk_tokens, self.tile, self.least = chunk_tokens, tile, least
        self.stages = 1  # of the model: each step carries its share of the decodes. Told by whoever runs it
        self._prompt = self._output = 0.0  # means of those that have ended

    def best_chunk(self) -> int:
        """C, such that with B - 1 decodes it is a whole number of tiles."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        riders = -(-self.limit.sequences // self.stages) - 1
        wanted = riders * self._prompt / self._output if self._output else 0.0
        wanted = min(max(wanted, self.least), self.limit.tokens - riders)
        tiles = max(1, round((wanted + riders) / self.tile), math.ceil((riders + 1) / self.tile))
        return max(1, min(tiles * self.tile, self.limit.tokens) - riders)

    def tokens(self, view: View) -> int:
        """One chunk, and one token for each that decodes."""
        return self.best_chunk() + sum(len(s.tokens) - s.computed <= 1 for s in view.running)

    def steady(self, view: View) -> int:
        """A chunk is added to the decodes."""
        return super().steady(view)

    def admit(self, seq: Sequence, reach: Reach, view: View) -> float:
        """Not beyond B: all that run have a token in every step."""
        return math.inf if len(view.running) >= self.limit.sequences else super().admit(seq, reach, view)

    def chunk(self, seq: Sequence, room: int, view: View) -> int:
        """No more than C of a prompt, however few decode."""
        return min(super().chunk(seq, room, view), self.best_chunk())

    def retire(self, seq: Sequence, finish: Finish, view: View) -> None:
        """Follow the means."""
        super().retire(seq, finish, view)
        if finish in (Finish.STOP, Finish.LENGTH) and seq.produced:
            weight = FORGET if self._output else 1.0
            self._prompt += weight * (seq.num_prompt - self._prompt)
            self._output += weight * (seq.produced - self._output)
