"""From logits to tokens: masks, penalties, truncation and the draw, for all rows of a step at once.

It knows what each ticket's request asked and produced. It must not know steps, blocks or texts.
A row's token is a function of its logits, its request and its own earlier tokens: every reduction over the vocabulary
is a maximum, a comparison or a sum of integers, so it has one value whatever stands beside it in the batch.

R = rows of logits, S = rows that draw, V = vocabulary.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shoal.core.types import TOKEN, Sampling, Start, TokenScore
from shoal.nn.random import draw
from shoal.nn.scores import descending, exponential, integer_weights, score

_MINUS_INFINITY = float("-inf")
_DRAW_BYTES = 16 << 20  # logits drawn from at a time; the draw needs about six times as much beside them


@dataclass(slots=True)
class Samples:
    """What `Sampler.sample` found, by ticket; every ticket is in `tokens` or in `errors`."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenScore] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class _Row:
    """One ticket: its request's wishes and what it has produced. Changed by the Sampler alone."""

    __slots__ = ("sampling", "num_prompt", "outputs", "counts", "edits", "remembers", "problem")

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

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}

    def start(self, start: Start) -> None:
        """Begin a ticket. A wish that the vocabulary cannot grant becomes the ticket's error at its first sample."""
        self._rows[start.ticket] = _Row(start, self._vocab_size)

    def drop(self, ticket: int) -> None:
        """Forget a ticket; one that never started is no error."""
        self._rows.pop(ticket, None)

    def sample(self, logits_RV: torch.Tensor, tickets: Sequence[int]) -> Samples:
        """Choose a token for each ticket from its row of float32 logits, and remember it.

        A row without a finite logit left is its ticket's error. The logits are not changed.
        """
        rows = [self._rows[ticket] for ticket in tickets]
        edited_RV = _edit(logits_RV, rows)
        best_R = edited_RV.argmax(dim=1)  # of equals the first; a NaN counts as the largest, and shows below
        tokens, values = best_R.tolist(), edited_RV.gather(1, best_R[:, None])[:, 0].tolist()
        result = Samples()
        for ticket, row, value in zip(tickets, rows, values, strict=True):
            if row.problem or not math.isfinite(value):
                result.errors[ticket] = row.problem or _nothing_left(value)
        drawing = [i for i, row in enumerate(rows) if not row.sampling.greedy and tickets[i] not in result.errors]
        size = max(1, _DRAW_BYTES // (4 * logits_RV.shape[1]))
        for first in range(0, len(drawing), size):
            part = drawing[first : first + size]
            for i, token in zip(part, _draw(edited_RV, part, [rows[i] for i in part]), strict=True):
                tokens[i] = token
        for i, (ticket, row) in enumerate(zip(tickets, rows, strict=True)):
            if ticket not in result.errors:
                result.tokens[ticket] = tokens[i]
                row.append(tokens[i])
        self._score(logits_RV, tickets, rows, result)
        return result

    def _score(self, logits_RV: torch.Tensor, tickets: Sequence[int], rows: list[_Row], result: Samples) -> None:
        """Log-probabilities are of the model's own distribution, before any wish of the request."""
        asked = [i for i, row in enumerate(rows) if row.sampling.logprobs >= 0 and tickets[i] in result.tokens]
        size = max(1, _DRAW_BYTES // (4 * logits_RV.shape[1]))
        for first in range(0, len(asked), size):
            part = asked[first : first + size]
            top = max(rows[i].sampling.logprobs for i in part)
            scores = score(_take(logits_RV, part), [result.tokens[tickets[i]] for i in part], top)
            for i, found in zip(part, scores, strict=True):
                kept = found.top[: rows[i].sampling.logprobs]
                result.logprobs[tickets[i]] = TokenScore(found.token, found.logprob, found.rank, kept)


def _take(x_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows, copied, unless they are all."""
    if len(rows) == x_RV.shape[0]:
        return x_RV
    return x_RV[torch.tensor(rows, dtype=torch.int64, device=x_RV.device)]


def _nothing_left(best: float) -> str:
    if best == _MINUS_INFINITY:
        return "no token may be sampled: allowed, banned and stop tokens with min_tokens leave none; relax one of them"
    return "the model's logits are not finite numbers at this position: check the checkpoint and its weight mode"


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


def _edit(logits_RV: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
    """The logits with every row's bias, masks and penalties applied; the same tensor when there are none."""
    edited = [i for i, row in enumerate(rows) if row.edits and not row.problem]
    if not edited:
        return logits_RV
    result_RV = logits_RV.clone()
    for i in edited:
        _edit_row(result_RV[i], rows[i])
    return result_RV


def _edit_row(row_V: torch.Tensor, row: _Row) -> None:
    """Apply in place, in the order that Sampling states."""
    s, device = row.sampling, row_V.device
    if s.logit_bias:
        bias = dict(s.logit_bias)  # of a token named twice the last counts
        row_V[_ids(list(bias), device)] += torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
    if s.allowed:
        ids = _ids(list(s.allowed), device)
        kept = row_V[ids]
        row_V.fill_(_MINUS_INFINITY)
        row_V[ids] = kept
    masked = [sequence[-1] for sequence in s.banned if _completes(row.outputs, sequence)]
    if len(row.outputs) < s.min_tokens:
        masked += [token for token in s.stop if 0 <= token < row_V.shape[0]]
    if masked:
        row_V[_ids(masked, device)] = _MINUS_INFINITY
    if row.counts:
        ids = _ids(list(row.counts), device)
        value = row_V[ids]
        value = torch.where(value < 0, value * s.repetition_penalty, value / s.repetition_penalty)
        count = torch.tensor(list(row.counts.values()), dtype=torch.float32, device=device)
        row_V[ids] = value - s.frequency_penalty * count - s.presence_penalty * (count > 0)


def _ids(tokens: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _completes(outputs: array[int], sequence: tuple[int, ...]) -> bool:
    """Whether `sequence` has been produced up to its last token. The prompt does not count, as in vLLM."""
    before = len(sequence) - 1
    return before >= 0 and before <= len(outputs) and tuple(outputs[len(outputs) - before :]) == sequence[:-1]


# -- the draw -----------------------------------------------------------------------------------------


def _draw(logits_RV: torch.Tensor, part: list[int], rows: list[_Row]) -> list[int]:
    """A token for each row in `part`: the inverse of the cumulated weights, in the order of token ids, at a random
    place that the row's seed, sample and position decide. Exact integers throughout."""
    x_SV = _take(logits_RV, part)
    s = [row.sampling for row in rows]
    heat_S1 = torch.tensor([each.temperature for each in s], dtype=torch.float32, device=x_SV.device)[:, None]
    z_SV = (x_SV - x_SV.max(dim=1, keepdim=True).values) / heat_S1
    weight_SV = integer_weights(_truncated(z_SV, s))
    sum_SV = weight_SV.cumsum(dim=1)
    places = [
        draw(row.sampling.seed, row.sampling.sample, row.position, 0) * total >> 64
        for row, total in zip(rows, sum_SV[:, -1].tolist(), strict=True)
    ]
    place_S1 = torch.tensor(places, dtype=torch.int64, device=x_SV.device)[:, None]
    found: list[int] = torch.searchsorted(sum_SV, place_S1, right=True)[:, 0].tolist()
    return found


def _truncated(z_SV: torch.Tensor, s: list[Sampling]) -> torch.Tensor:
    """exp of the values, 0 for tokens outside top-k, top-p or min-p. Tokens equal to the last one kept are kept."""
    sorting = [i for i, each in enumerate(s) if 0 < each.top_k < z_SV.shape[1] or each.top_p < 1]
    if sorting:
        edge_S1 = torch.full((len(s), 1), _MINUS_INFINITY, device=z_SV.device)
        edge_S1[sorting] = _edge(_take(z_SV, sorting), [s[i] for i in sorting])
        z_SV = z_SV.masked_fill(z_SV < edge_S1, _MINUS_INFINITY)
    e_SV = exponential(z_SV)
    if any(each.min_p > 0 for each in s):
        least_S1 = torch.tensor([each.min_p for each in s], dtype=torch.float32, device=z_SV.device)[:, None]
        e_SV = e_SV.masked_fill(e_SV < least_S1, 0.0)
    return e_SV


def _edge(z_SV: torch.Tensor, s: list[Sampling]) -> torch.Tensor:
    """The smallest value within each row's top-k and, of what that leaves, top-p, as [S, 1].

    top-p is the shortest run of best tokens whose weight reaches that share of the whole; the best is always in it.
    """
    value_SV, last = descending(z_SV), z_SV.shape[1] - 1
    rank_S1 = torch.tensor([min(each.top_k - 1, last) if each.top_k > 0 else last for each in s], device=z_SV.device)
    edge_S1 = value_SV.gather(1, rank_S1[:, None])
    weight_SV = integer_weights(exponential(value_SV)).masked_fill_(value_SV < edge_S1, 0)
    sum_SV = weight_SV.cumsum(dim=1)
    totals: list[int] = sum_SV[:, -1].tolist()
    limits = [
        min(math.ceil(each.top_p * total), total) if each.top_p < 1 else total
        for each, total in zip(s, totals, strict=True)
    ]
    limit_S1 = torch.tensor(limits, dtype=torch.int64, device=z_SV.device)[:, None]
    short_S1 = (sum_SV < limit_S1).sum(dim=1, keepdim=True)
    # where top-p keeps all, its run ends at the last token of any weight, and lighter ones are nobody's anyway
    return torch.maximum(edge_S1, value_SV.gather(1, short_S1))
