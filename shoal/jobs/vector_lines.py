"""The bodies of answers that are numbers: vectors, classes, scores, in the shapes of OpenAI's and vLLM's servers.

It must not know how a number was computed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.jobs.body import ClassifyBody, EmbeddingBody, PairBody, PoolingBody, RerankBody, VectorBody
from shoal.jobs.given import pairs_of
from shoal.text.heads import Head

Vectors = Sequence[Sequence[float]]


def vector_reply(
    body: VectorBody, vectors: Vectors, head: Head | None, frame: dict[str, Any], tokens: int
) -> dict[str, Any]:
    """What a row is answered with whose prompts came to these vectors. `frame` has id, created and model."""
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    named = {**frame, "id": f"{_prefix(body)}-{frame['id']}"}
    whole = {"id": named["id"], "object": "list", "created": frame["created"], "model": frame["model"]}
    data: list[dict[str, Any]]
    match body:
        case EmbeddingBody():
            data = [
                {"object": "embedding", "index": index, "embedding": _shown(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ]
            return {"object": "list", "data": data, "model": frame["model"], "usage": usage}
        case PoolingBody():
            shown = [_activated(vector, head, body.use_activation) for vector in vectors]
            data = [
                {"index": index, "object": "pooling", "data": _shown(vector, body.encoding_format)}
                for index, vector in enumerate(shown)
            ]
        case ClassifyBody():
            data = [_class(index, vector, head, body.use_activation) for index, vector in enumerate(vectors)]
        case RerankBody():
            results = _ranked(body, scores(body, vectors, head))
            return {"id": named["id"], "model": frame["model"], "usage": usage, "results": results}
        case _:
            assert isinstance(body, PairBody), body
            found = scores(body, vectors, head)
            data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(found)]
    return {**whole, "data": data, "usage": usage}


def _prefix(body: VectorBody) -> str:
    return "pooling" if isinstance(body, PoolingBody) else "classify" if isinstance(body, ClassifyBody) else "score"


def _activated(vector: Sequence[float], head: Head | None, activate: bool | None) -> Sequence[float]:
    return vector if head is None else head.values(vector, activate is not False)


def _class(index: int, vector: Sequence[float], head: Head | None, activate: bool | None) -> dict[str, Any]:
    assert head is not None
    shown = list(_activated(vector, head, activate))
    return {"index": index, "label": head.labels[shown.index(max(shown))], "probs": shown, "num_classes": len(shown)}


def scores(body: PairBody, vectors: Vectors, head: Head | None) -> list[float]:
    """How each pair goes together: what the head makes of it, or the cosine of its two vectors."""
    if head is not None:
        return [head.values(vector, body.use_activation is not False)[0] for vector in vectors]
    count = len(pairs_of(body)[0])
    firsts, seconds = vectors[:count], vectors[count:]
    firsts = list(firsts) * len(seconds) if count == 1 else firsts
    return [_cosine(first, second) for first, second in zip(firsts, seconds, strict=True)]


def _cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Sums are exact, so that no order of them tells; 0 beside a vector of zeros."""
    product = math.fsum(a * b for a, b in zip(first, second, strict=True))
    lengths = math.fsum(a * a for a in first) * math.fsum(b * b for b in second)
    return product / math.sqrt(lengths) if lengths else 0.0


def _ranked(body: RerankBody, found: Sequence[float]) -> list[dict[str, Any]]:
    """The best documents first; of equal ones that which was given first."""
    documents = pairs_of(body)[1]
    order = sorted(range(len(found)), key=lambda index: -found[index])
    return [
        {"index": index, "document": {"text": documents[index]}, "relevance_score": found[index]}
        for index in (order[: body.top_n] if body.top_n else order)
    ]


def _shown(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """Its numbers, or the bytes of its numbers as little-endian float32 in base64."""
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
