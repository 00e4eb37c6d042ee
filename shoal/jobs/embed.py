"""Texts that become vectors: how they are cut, and what of them cannot be. It must not know a tokenizer or a model."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.errors import RowError
from shoal.core.types import Tokens
from shoal.jobs.body import EmbeddingBody


def check_kind(body: object, width: int, encoder: bool, why_none: str = "") -> None:
    """Refuse a row that the model has no answer for; `width` is that of its vectors, 0 where it makes none, and
    `why_none` says why not where its folder says how."""
    if isinstance(body, EmbeddingBody) and not width:
        why = why_none or "run the row with an encoder, or a folder that has modules.json"
        raise RowError(
            f"this model makes texts and no embeddings: {why}",
            "not_supported",
            "url",
        )
    if encoder and not isinstance(body, EmbeddingBody):
        raise RowError(
            "this model makes embeddings and no text: send texts to /v1/embeddings, or take another model",
            "not_supported",
            "url",
        )


def fit(
    body: EmbeddingBody, given: Sequence[str | list[int]], prompts: Sequence[Tokens], context: int, num_after: int
) -> list[Tokens]:
    """The prompts as they will be computed. Where the row has them cut they keep their beginning, and a text also the
    `num_after` tokens that its tokenizer puts at its end. RowError for one that is longer than the context."""
    cut = body.truncate_prompt_tokens
    most = context if cut is None or cut < 0 else cut
    kept = 0 if body.add_special_tokens is False else min(num_after, most)
    fitted = []
    for text, prompt in zip(given, prompts, strict=True):
        end = kept if isinstance(text, str) else 0
        if cut is not None and len(prompt) > most:
            prompt = prompt[: most - end] + prompt[len(prompt) - end :]
        if len(prompt) > context:
            raise RowError(
                f"the model takes {context} tokens, and the input has {len(prompt)}: shorten it, or give"
                " truncate_prompt_tokens (-1 keeps as many as fit)",
                "context_length_exceeded",
                "input",
            )
        fitted.append(prompt)
    return fitted


def check_dimensions(body: EmbeddingBody, width: int) -> None:
    """Refuse vectors of another width than the model's."""
    if body.dimensions not in (None, width):
        raise RowError(
            f"this model's vectors have {width} numbers, and cut ones would not be its own: remove dimensions",
            "not_supported",
            "dimensions",
        )
