"""Log-probabilities in the three shapes that clients know: chat, completions, and vLLM's prompt_logprobs.

It must not know what was asked, nor how a score was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from shoal.core.types import Tokens, TokenScore

LOWEST = -9999.0  # what clients get for a token that could not be: JSON has no infinity


class TokenTexts(Protocol):
    """What is needed of a tokenizer."""

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


class TokenNames:
    """How tokens are written in an answer: their text, or their number where the row asks for numbers."""

    def __init__(self, texts: TokenTexts, as_ids: bool) -> None:
        self._texts = texts
        self._as_ids = as_ids

    def name(self, token: int) -> str:
        """The token's text, U+FFFD where it is a part of a character; or `token_id:5`."""
        return f"token_id:{token}" if self._as_ids else self._texts.token_text(token)

    def bytes(self, token: int) -> list[int]:
        """The token's bytes as numbers."""
        return list(self._texts.token_bytes(token))


def chat_logprobs(scores: Sequence[TokenScore], top: int, names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat, with `top` alternatives at each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": max(logprob, LOWEST), "bytes": names.bytes(token)}

    content = [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(*best) for best in score.top[:top]]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    unscored: Tokens, scores: Sequence[TokenScore], top: int, names: TokenNames
) -> dict[str, list[Any]]:
    """`choices[].logprobs` of a completion: of the echoed prompt tokens (none without echo), then of the produced.

    The first token of a prompt has no log-probability, nor have others that are `unscored`: null. `top_logprobs` hold
    the token itself and the `top` best.
    """
    texts = [names.name(token) for token in unscored] + [names.name(score.token) for score in scores]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    nothing: list[Any] = [None] * len(unscored)
    return {
        "text_offset": offsets[: len(texts)],
        "token_logprobs": nothing + [max(score.logprob, LOWEST) for score in scores],
        "tokens": texts,
        "top_logprobs": nothing + [_by_name(score, top, names) for score in scores],
    }


def _by_name(score: TokenScore, top: int, names: TokenNames) -> dict[str, float]:
    """Tokens that read the same share a name: the likeliest of them has it."""
    best = {names.name(score.token): max(score.logprob, LOWEST)}
    for token, logprob in score.top[:top]:
        name = names.name(token)
        best[name] = max(best.get(name, LOWEST), logprob)
    return best


def prompt_logprobs(
    unscored: int, scores: Sequence[TokenScore], top: int, names: TokenNames
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first tokens, then by token id the token itself and the `top` best."""
    result: list[dict[str, Any] | None] = [None] * unscored
    for score in scores:
        entries = {str(score.token): _ranked(score.token, score.logprob, score.rank, names)}
        for rank, (token, logprob) in enumerate(score.top[:top], 1):
            entries.setdefault(str(token), _ranked(token, logprob, rank, names))
        result.append(entries)
    return result


def _ranked(token: int, logprob: float, rank: int, names: TokenNames) -> dict[str, Any]:
    return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": names.name(token)}
