"""From logits to tokens: masks and penalties, then the kernels' maxima, draws and scores, for all rows at once.

It knows what each ticket's request asked and produced. It must not know steps, blocks or texts, nor reduce a row.
A row's token is a function of its logits, its request and its own earlier tokens: every reduction over the vocabulary
is a maximum, a comparison or a sum of integers, so it has one value whatever stands beside it in the batch.

R = rows of logits, S = rows that draw, V = vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeAlias

import numpy as np
import torch

from shoal.core.types import TOKEN, Sampling, Start, TokenScore
from shoal.kernels import Draws, Kernels
from shoal.nn.masks import Bits, Masks
from shoal.nn.random import draw
from shoal.nn.scores import score

CONSTRAINT = "constraint: "  # begins the error of a row whose constraint cannot be kept

_MINUS_INFINITY = float("-inf")


@dataclass(slots=True)
class Samples:
    """What `Sampler.sample` found, by ticket; every ticket is in `tokens` or in `errors`."""

    tokens: dict[int, int] = field(default_factory=dict)
    forced: dict[int, list[int]] = field(default_factory=dict)  # what has to follow that token, where anything has to
    logprobs: dict[int, TokenScore] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class _Row:
    """One ticket: its request's wishes and what it has produced. Changed by the Sampler alone."""

    __slots__ = (
        "sampling", "num_prompt", "outputs", "counts", "edits", "remembers", "draws", "plain", "problem", "constrained"
    )  # fmt: skip

    def __init__(self, start: Start, vocab_size: int) -> None:
        s = start.request.sampling
        self.sampling = s
        self.num_prompt = len(start.request.prompt)
        self.remembers = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        self.edits = bool(self.remembers or s.logit_bias or s.allowed or s.banned or s.min_tokens)
        self.outputs: array[int] = array(TOKEN)
        # how often each token was produced; tokens of the prompt stand with 0 where the repetition penalty needs them
        self.counts: dict[int, int] = dict.fromkeys(start.request.prompt if s.repetition_penalty != 1 else (), 0)
        self.problem = _problem(s, vocab_size)
        self.constrained = start.request.constraint is not None and not self.problem
        self.draws = not s.greedy and not self.problem
        self.edits = self.edits and not self.problem
        self.plain = s.greedy and not self.edits and s.logprobs < 0  # its token is the best, and that is all
        for token in start.produced:
            self.append(token)

    def append(self, token: int) -> None:
        """Remember a token it produced."""
        self.outputs.append(token)
        if self.remembers:
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def position(self) -> int:
        """Of the token to be sampled next."""
        return self.num_prompt + len(self.outputs)


class Sampler:
    """Chooses the next token of every ticket it was told to start. One thread."""

    def __init__(self, vocab_size: int, kernels: Kernels, masks: Masks | None = None) -> None:
        """Without masks a request with a constraint is an error: it is never answered freely."""
        self._vocab_size = vocab_size
        self._kernels = kernels
        self._masks = masks
        self._rows: dict[int, _Row] = {}

    def prepare(self, start: Start) -> None:
        """Begin what a ticket needs by its first sample. May be called by another thread, before `start`."""
        if self._masks is not None:
            self._masks.start(start)

    def start(self, start: Start) -> None:
        """Begin a ticket. A wish that the vocabulary cannot grant becomes the ticket's error at its first sample."""
        self._rows[start.ticket] = _Row(start, self._vocab_size)

    def drop(self, ticket: int) -> None:
        """Forget a ticket; one that never started is no error."""
        self._rows.pop(ticket, None)
        if self._masks is not None:
            self._masks.drop(ticket)

    def close(self) -> None:
        """Wait for what was begun. Nothing may be sampled after."""
        if self._masks is not None:
            self._masks.close()

    def sample(self, logits_RV: torch.Tensor, tickets: Sequence[int]) -> Samples:
        """Choose a token for each ticket from its row of float32 logits, and remember it.

        A row without a finite logit left is its ticket's error. The logits are contiguous, and are as before at the
        end: rows are edited in place, as most wishes change few tokens of many. What a constraint forbids stays
        forbidden, where no log-probabilities are asked for.
        """
        rows = [self._rows[ticket] for ticket in tickets]
        special = [i for i, row in enumerate(rows) if not row.plain]
        constrained = [i for i, row in enumerate(rows) if row.constrained]
        unmasked, runs, free = self._forbid(logits_RV, tickets, rows, constrained) if constrained else ([], {}, [])
        changes = [(logits_RV[i], *_edit(logits_RV[i], rows[i])) for i in special if rows[i].edits]
        try:
            tokens, values = self._choose(logits_RV, rows, special)
            followed = self._settle(logits_RV, tickets, rows, free, tokens, values) if free else set()
        finally:
            for row_V, where, before in changes:
                row_V[where] = before
            for row_V, before in unmasked:
                row_V[:] = before
        result = Samples()
        for ticket, row, token, value in zip(tickets, rows, tokens, values, strict=True):
            if row.problem or not isfinite(value):
                result.errors[ticket] = row.problem or _nothing_left(value)
                continue
            run = runs.get(ticket) if runs else None
            result.tokens[ticket] = run[0] if run else token
            for each in run or (token,):
                row.append(each)
            if run and len(run) > 1:
                result.forced[ticket] = run[1:]
        if constrained and self._masks is not None:
            named = [tickets[i] for i in constrained if tickets[i] not in runs and tickets[i] not in followed]
            self._masks.give({ticket: result.tokens[ticket] for ticket in named if ticket in result.tokens})
        if special:
            self._score(logits_RV, tickets, rows, result)
        return result

    def _forbid(
        self, logits_RV: torch.Tensor, tickets: Sequence[int], rows: list[_Row], constrained: list[int]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[int, list[int]], list[int]]:
        """Forbid in place what the rows' constraints do. Gives rows that are to be as before and how they were, by
        ticket the tokens of those that have no choice, and the rows whose best token is asked about first."""
        if self._masks is None:
            for i in constrained:
                rows[i].problem = "this engine keeps no constraints"
            return [], {}, []
        masked: list[int] = []
        runs: dict[int, list[int]] = {}
        free: list[int] = []
        bits: list[Bits] = []
        for i, followed in zip(constrained, self._masks.take([tickets[i] for i in constrained]), strict=True):
            if followed.problem:
                rows[i].problem = CONSTRAINT + followed.problem
            elif followed.forced:
                runs[tickets[i]], followed.forced = followed.forced, []
            elif followed.open:
                free.append(i)
            elif followed.bits is not None:
                masked.append(i)
                early = len(rows[i].outputs) < rows[i].sampling.min_tokens
                bits.append(_not_yet(followed.bits, rows[i].sampling.stop) if early else followed.bits)
        if not masked:
            return [], runs, free
        unmasked = [(logits_RV[i], logits_RV[i].clone()) for i in masked if rows[i].sampling.logprobs >= 0]
        bits_KW = torch.from_numpy(np.concatenate(bits).reshape(len(bits), -1)).to(logits_RV.device)
        self._kernels.forbid(logits_RV, torch.tensor(masked, device=logits_RV.device), bits_KW)
        return unmasked, runs, free

    def _settle(
        self, logits_RV: torch.Tensor, tickets: Sequence[int], rows: list[_Row], free: list[int], tokens: list[int],
        values: list[float],
    ) -> set[int]:  # fmt: skip
        """Keep to the constraints of rows whose best token was found without: where it may not come, the best that may.
        Gives the tickets whose rows have produced theirs.

        Of equals the first is the best, with a mask and without, so a best token that may come is the one a mask would
        have left. A logit that is no finite number may belong to a token that may not come: it is for the mask to say.
        """
        assert self._masks is not None
        place = {tickets[i]: i for i in free}
        best = {ticket: tokens[i] if isfinite(values[i]) else -1 for ticket, i in place.items()}
        again: list[int] = []
        bits: list[Bits] = []
        refused = self._masks.refused(best)
        for ticket, followed in refused.items():
            if followed.bits is None:
                rows[place[ticket]].problem = CONSTRAINT + followed.problem
            else:
                again.append(place[ticket])
                bits.append(followed.bits)
        if again:
            self._best_of(logits_RV, again, bits, tokens, values)
        return place.keys() - refused.keys()

    def _best_of(
        self, logits_RV: torch.Tensor, again: list[int], bits: list[Bits], tokens: list[int], values: list[float]
    ) -> None:
        """The best tokens of these rows that their masks leave, and their logits."""
        logits_KV = logits_RV[_ids(again, logits_RV.device)]
        bits_KW = torch.from_numpy(np.concatenate(bits).reshape(len(bits), -1)).to(logits_RV.device)
        self._kernels.forbid(logits_KV, torch.arange(len(again), device=logits_RV.device), bits_KW)
        best_K, value_K = self._kernels.largest(logits_KV)
        for i, token, value in zip(again, best_K.tolist(), value_K.tolist(), strict=True):
            tokens[i], values[i] = token, value

    def _choose(self, logits_RV: torch.Tensor, rows: list[_Row], special: list[int]) -> tuple[list[int], list[float]]:
        """A token for each row, drawn where it asks for that and else the best; and the largest logit of each."""
        best_R, value_R = self._kernels.largest(logits_RV)
        tokens: list[int] = best_R.tolist()
        values: list[float] = value_R.tolist()
        drawing = [i for i in special if rows[i].draws and isfinite(values[i])]
        if drawing:
            draws = _draws(value_R, drawing, [rows[i] for i in drawing])
            for i, token in zip(drawing, self._kernels.draw(logits_RV, draws).tolist(), strict=True):
                tokens[i] = token
        return tokens, values

    def _score(self, logits_RV: torch.Tensor, tickets: Sequence[int], rows: list[_Row], result: Samples) -> None:
        """Log-probabilities are of the model's own distribution, before any wish of the request."""
        asked = [i for i, row in enumerate(rows) if row.sampling.logprobs >= 0 and tickets[i] in result.tokens]
        if not asked:
            return
        top = max(rows[i].sampling.logprobs for i in asked)
        scores = score(self._kernels, logits_RV, [result.tokens[tickets[i]] for i in asked], top, asked)
        for i, found in zip(asked, scores, strict=True):
            wanted = rows[i].sampling.logprobs
            if wanted < len(found.top):
                found = TokenScore(found.token, found.logprob, found.rank, found.top[:wanted])
            result.logprobs[tickets[i]] = found


def _draws(value_R: torch.Tensor, drawing: list[int], rows: list[_Row]) -> Draws:
    """The wishes of rows that draw. A row's random number is decided by its seed, its sample and its position."""
    s, device = [row.sampling for row in rows], value_R.device
    numbers = [draw(row.sampling.seed, row.sampling.sample, row.position, 0) for row in rows]
    row_S = torch.tensor(drawing, dtype=torch.int64, device=device)
    return Draws(
        row_S=row_S,
        number_S=torch.tensor([number - (number >> 63 << 64) for number in numbers], dtype=torch.int64, device=device),
        best_S=value_R[row_S],
        heat_S=torch.tensor([each.temperature for each in s], dtype=torch.float32, device=device),
        top_k_S=torch.tensor([max(0, each.top_k) for each in s], dtype=torch.int64, device=device),
        top_p_S=torch.tensor([each.top_p for each in s], dtype=torch.float64, device=device),
        min_p_S=torch.tensor([each.min_p for each in s], dtype=torch.float32, device=device),
    )


def _nothing_left(best: float) -> str:
    if best == _MINUS_INFINITY:
        return (
            "no token may be sampled: allowed, banned and stop tokens with min_tokens, or the constraint, leave none;"
            " relax one of them"
        )
    return "the model's logits are not finite numbers at this position: check the checkpoint and its weight mode"


def _not_yet(bits_W: Bits, stop: frozenset[int]) -> Bits:
    """The mask without the stop tokens that min_tokens forbids; a text that is over ends all the same."""
    words = bits_W.view(np.uint32).copy()
    for token in stop:
        if 0 <= token < 32 * len(words):
            words[token >> 5] &= ~np.uint32(1 << (token & 31))
    return words.view(np.int32) if words.any() else bits_W


def _problem(s: Sampling, vocab_size: int) -> str:
    """Why these wishes cannot be granted, or ''. Stop tokens outside the vocabulary are harmless: they never come."""
    named = [token for token, _ in s.logit_bias]
    named += s.allowed
    named += [token for sequence in s.banned for token in sequence]
    wrong = next((token for token in named if not 0 <= token < vocab_size), None)
    if wrong is not None:
        return f"token {wrong} is named by logit_bias, allowed or banned, but the vocabulary has {vocab_size} tokens"
    if s.repetition_penalty <= 0 or s.temperature < 0 or not 0 < s.top_p <= 1 or not 0 <= s.min_p <= 1:
        return "repetition_penalty must be > 0, temperature >= 0, top_p in (0, 1] and min_p in [0, 1]"
    return ""


# -- wishes that change single logits -----------------------------------------------------------------


_Where: TypeAlias = "torch.Tensor | slice"


def _edit(row_V: torch.Tensor, row: _Row) -> tuple[_Where, torch.Tensor]:
    """Apply in place, in the order that Sampling states. Gives which logits were changed, and what they were."""
    s, device = row.sampling, row_V.device
    bias = dict(s.logit_bias)  # of a token named twice the last counts
    masked = [sequence[-1] for sequence in s.banned if _completes(row.outputs, sequence)]
    if len(row.outputs) < s.min_tokens and not row.constrained:
        masked += [token for token in s.stop if 0 <= token < row_V.shape[0]]
    where = slice(None) if s.allowed else _ids([*bias, *masked, *row.counts], device)
    before = row_V[where].clone()
    if bias:
        row_V[_ids(list(bias), device)] += torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
    if s.allowed:
        ids = _ids(list(s.allowed), device)
        kept = row_V[ids]
        row_V.fill_(_MINUS_INFINITY)
        row_V[ids] = kept
    if masked:
        row_V[_ids(masked, device)] = _MINUS_INFINITY
    if row.counts:
        ids = _ids(list(row.counts), device)
        value = row_V[ids]
        value = torch.where(value < 0, value * s.repetition_penalty, value / s.repetition_penalty)
        count = torch.tensor(list(row.counts.values()), dtype=torch.float32, device=device)
        row_V[ids] = value - s.frequency_penalty * count - s.presence_penalty * (count > 0)
    return where, before


def _ids(tokens: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _completes(outputs: array[int], sequence: tuple[int, ...]) -> bool:
    """Whether `sequence` has been produced up to its last token. The prompt does not count, as in vLLM."""
    before = len(sequence) - 1
    return before >= 0 and before <= len(outputs) and tuple(outputs[len(outputs) - before :]) == sequence[:-1]
