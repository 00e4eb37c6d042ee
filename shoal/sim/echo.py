"""A model whose keys and values are the token ids themselves, kept in the blocks.

It knows what a Step means and nothing else: it must not look at the scheduler. The next token is a hash of the
context read back through the block table, and of the produced tokens in the ticket's own state, so a block freed
early, shared wrongly, copied wrongly or mapped wrongly, and a row resumed wrongly, change the text.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable

from shoal.core.clock import SimClock
from shoal.core.types import PENDING, TOKEN, Answer, Request, Slice, Step, StepResult, TokenScore

UNWRITTEN = -7
VOCABULARY = 64  # tokens 2 … 65 are produced


def digest(context: Iterable[int], produced: Iterable[int], request: Request) -> int:
    """A number that depends on everything a real next token may depend on."""
    state = hashlib.blake2b(array(TOKEN, context).tobytes(), digest_size=8)
    state.update(b"|" + array(TOKEN, produced).tobytes())
    sampling = request.sampling
    seed = 0 if sampling.greedy else sampling.seed
    state.update(f"|{request.root}|{seed}|{sampling.sample}|{sampling.temperature}".encode())
    return int.from_bytes(state.digest(), "little")


def next_token(context: Iterable[int], produced: list[int], request: Request) -> int:
    """The echo model's answer: never a stop token before `min_tokens`."""
    token = digest(context, produced, request) % VOCABULARY + 2
    if len(produced) < request.sampling.min_tokens:
        while token in request.sampling.stop:
            token += 1
    return token


def reference(request: Request) -> list[int]:
    """The tokens of the request's answer, without blocks, batches or a scheduler."""
    produced: list[int] = []
    while request.samples and len(produced) < request.sampling.max_tokens:
        produced.append(next_token([*request.prompt, *produced], produced, request))
        if produced[-1] in request.sampling.stop:
            break
    return produced


class Done:
    """A step that is done as soon as it is handed in."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class EchoExecutor:
    """Runs Steps on token ids. Moves the clock by a millisecond a token, if it is given one.

    `forces` is the chance that a token has to be followed by the next one, so that nobody need ask the model for it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, clock: SimClock | None = None, seed: int = 1, forces: float = 0.0
    ) -> None:
        self.store = [array(TOKEN, [UNWRITTEN]) * block_size for _ in range(num_blocks)]
        self.block_size, self.clock = block_size, clock
        self.requests: dict[int, Request] = {}
        self.produced: dict[int, list[int]] = {}
        self.forces = forces
        self.tokens_computed = 0
        self._luck = random.Random(seed)

    def submit(self, step: Step) -> Done:
        """Run the whole step now. A read of an unwritten position is an AssertionError."""
        for ticket in step.drops:
            self.requests.pop(ticket, None)
            self.produced.pop(ticket, None)
        for start in step.starts:
            self.requests[start.ticket] = start.request
            self.produced[start.ticket] = list(start.produced)
        copies = [self.store[move.src][: move.tokens] for move in step.moves]
        for move, copy in zip(step.moves, copies, strict=True):
            assert UNWRITTEN not in copy, f"a move copies unwritten positions: {move}"
            self.store[move.dst][: move.tokens] = copy
        for part in step.slices:  # all are written before any is read, as in a layer of a model
            prompt, produced = len(self.requests[part.ticket].prompt), self.produced[part.ticket]
            tokens = [produced[i - prompt] if t == PENDING else t for i, t in enumerate(part.tokens, part.start)]
            self._write(part, part.start, tokens)
        result = StepResult({})
        for part in step.slices:
            if part.want:
                self._answer(part, result)
        self.tokens_computed += step.num_tokens
        if self.clock is not None:
            self.clock.advance_to(self.clock.now() + 1e-3 * step.num_tokens)
        return Done(result)

    def _answer(self, part: Slice, result: StepResult) -> None:
        request, end = self.requests[part.ticket], part.start + len(part.tokens)
        prompt = len(request.prompt)
        for position in range(end - part.want, end):
            if position + 1 < prompt:
                score = digest(self._read(part, position + 1), [], request) % 1000 / -100.0
                entry = TokenScore(request.prompt[position + 1], score, 1)
                result.scores.setdefault(part.ticket, []).append(entry)
        if end < prompt + len(self.produced[part.ticket]):
            return  # more is known than was planned with
        if request.answer is Answer.VECTOR:
            result.vectors[part.ticket] = [float(digest(self._read(part, end), [], request) % 1000)]
        if request.samples:
            result.tokens[part.ticket] = self._sample(part, end, request)
            if self.forces:
                result.forced[part.ticket] = self._force(request, self.produced[part.ticket])

    def _force(self, request: Request, produced: list[int]) -> list[int]:
        before, most = len(produced), request.sampling.max_tokens
        while len(produced) < most and produced[-1] not in request.sampling.stop and self._luck.random() < self.forces:
            produced.append(next_token([*request.prompt, *produced], produced, request))
        return produced[before:]

    def _sample(self, part: Slice, at: int, request: Request) -> list[int]:
        produced, new = self.produced[part.ticket], []
        for guess in range(part.draft + 1):
            new.append(next_token(self._read(part, at), produced, request))
            produced.append(new[-1])
            if guess == part.draft or self._luck.random() < 0.4:
                break
            self._write(part, at, [new[-1]])
            at += 1
        return new

    def _write(self, part: Slice, at: int, tokens: list[int]) -> None:
        size = self.block_size
        for i, token in enumerate(tokens, at):
            self.store[part.blocks[i // size]][i % size] = token

    def _read(self, part: Slice, count: int) -> array[int]:
        context = array(TOKEN)
        for block in part.blocks[: -(-count // self.block_size)]:
            context += self.store[block]
        context = context[:count]
        assert UNWRITTEN not in context, f"ticket {part.ticket} reads unwritten positions"
        return context
