"""Rows that want numbers and not a text: which a model has an answer for, and how their texts are cut.

It must not know a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.errors import RowError
from shoal.core.types import Tokens
from shoal.jobs.body import ClassifyBody, EmbeddingBody, PairBody, PoolingBody, VectorBody
from shoal.text.checkpoint import ModelInfo


def check_kind(body: object, model: ModelInfo) -> None:
    """Refuse a row that the model has no answer for."""
    if not isinstance(body, VectorBody):
        if model.head is not None:
            raise _unsuited("this model makes numbers of its labels, and no text: use /v1/classify, /v1/score and such")
        if model.encoder:
            raise _unsuited(
                "this model makes embeddings and no text: send texts to /v1/embeddings, or take another model"
            )
        return
    has_vector, has_head = bool(model.vector), model.head is not None
    match body:
        case EmbeddingBody():
            suited = has_vector
        case PoolingBody():
            suited = {"embed": has_vector, "classify": has_head, None: has_vector or has_head}[body.task]
        case ClassifyBody():
            suited = has_head
        case _:
            suited = has_vector or (model.head is not None and len(model.head.labels) == 1)
    if suited:
        return
    if model.head is not None and isinstance(body, PairBody):
        raise _unsuited(
            f"a score is one number, and this model's head makes {len(model.head.labels)}: use /v1/classify, or take"
            " a model with one label"
        )
    if model.head is not None:
        raise _unsuited("this model makes numbers of its labels and no embeddings: use /v1/classify or /v1/pooling")
    if has_vector:
        raise _unsuited("this model has no labels, for it makes embeddings: take a *ForSequenceClassification model")
    what = "no numbers of labels" if isinstance(body, ClassifyBody) else "no embeddings"
    why = model.no_vector or (
        "take a *ForSequenceClassification model"
        if isinstance(body, ClassifyBody)
        else "run the row with an encoder, or a folder that has modules.json"
    )
    raise _unsuited(f"this model makes texts and {what}: {why}")


def _unsuited(problem: str) -> RowError:
    return RowError(problem, "not_supported", "url")


def fit(
    body: VectorBody, given: Sequence[str | list[int]], prompts: Sequence[Tokens], context: int, num_after: int
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
        check_context(prompt, context, "input")
        fitted.append(prompt)
    return fitted


def check_context(prompt: Tokens, context: int, param: str) -> None:
    """Refuse a prompt of more tokens than the model takes."""
    if len(prompt) > context:
        raise RowError(
            f"the model takes {context} tokens, and the input has {len(prompt)}: shorten it, or give"
            " truncate_prompt_tokens (-1 keeps as many as fit)",
            "context_length_exceeded",
            param,
        )


def check_shown(body: VectorBody, model: ModelInfo) -> None:
    """Refuse vectors of another width than the model's, or not as it makes them."""
    width = len(model.head.labels) if model.head is not None else model.vector
    if isinstance(body, EmbeddingBody | PoolingBody) and body.dimensions not in (None, width):
        raise RowError(
            f"this model's vectors have {width} numbers, and cut ones would not be its own: remove dimensions",
            "not_supported",
            "dimensions",
        )
    if isinstance(body, PoolingBody) and model.head is None and body.use_activation is False:
        raise RowError(
            "vectors are as the model's folder says: remove use_activation, which is for labels",
            "not_supported",
            "use_activation",
        )
