"""The urls that a row may name, and the bodies that go with them. It must not know what is made of either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from shoal.jobs.body import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)

Endpoint = Literal["chat", "completions", "embeddings", "classify", "pooling", "score", "rerank", "plain"]

_OPENAI: Mapping[str, tuple[Endpoint, type[Body]]] = {
    "/v1/chat/completions": ("chat", ChatBody),
    "/v1/completions": ("completions", CompletionBody),
    "/v1/embeddings": ("embeddings", EmbeddingBody),
}
_OTHERS: Mapping[str, tuple[Endpoint, type[Body]]] = {
    "/score": ("score", ScoreBody),
    "/rerank": ("rerank", RerankBody),
    "/classify": ("classify", ClassifyBody),
    "/pooling": ("pooling", PoolingBody),
}
URLS: Mapping[str, tuple[Endpoint, type[Body]]] = {
    **_OPENAI, **{f"/v1{url}": kind for url, kind in _OTHERS.items()}, **_OTHERS, "/v2/rerank": _OTHERS["/rerank"],
}  # fmt: skip
"""What a row with each url asks for. Servers know the latter with and without a version before them."""

NAMED = ", ".join((*_OPENAI, *(f"/v1{url}" for url in _OTHERS)))
"""Those to choose from, in words."""
