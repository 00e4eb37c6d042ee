"""Rows that want numbers and not a text, as texts to tokenize and as the prompts that are computed.

It knows how a model takes inputs, chats and pairs of texts; it must not know requests, nor what numbers come of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Tokens
from shoal.jobs.body import ClassifyBody, PairBody, VectorBody
from shoal.jobs.embed import check_context, check_kind, check_shown, fit
from shoal.jobs.given import pairs_of
from shoal.jobs.schema import RowSpec
from shoal.text.checkpoint import ModelInfo
from shoal.text.joint import Joint


class PairTemplate(Protocol):
    """What is needed of a chat template."""

    @property
    def pairs(self) -> bool: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str: ...


class VectorRows:
    """What turns these rows into prompts. It keeps nothing of them."""

    def __init__(self, model: ModelInfo, template: PairTemplate | None, joint: Joint | None, num_after: int) -> None:
        self.model, self._joint, self._num_after = model, joint, num_after
        self._template = template if template is not None and template.pairs else None

    def texts(self, row: RowSpec, render: Callable[[ClassifyBody], str]) -> tuple[list[str], bool]:
        """The texts to tokenize, and whether the tokenizer adds its special tokens. Token-id inputs are not here."""
        body = row.body
        assert isinstance(body, VectorBody), body
        check_kind(body, self.model)
        if isinstance(body, PairBody):
            return self._pair_texts(body)
        if isinstance(body, ClassifyBody) and body.messages is not None:
            return [render(body)], bool(body.add_special_tokens)
        return [given for given in row.prompts if isinstance(given, str)], body.add_special_tokens is not False

    def prompts(self, row: RowSpec, tokens: Sequence[Tokens]) -> list[Tokens]:
        """The prompts of a row whose texts, or whose given ones, are these tokens."""
        body, context = row.body, self.model.vector_context
        assert isinstance(body, VectorBody), body
        check_shown(body, self.model)
        if isinstance(body, PairBody) and self._joined:
            return self._join(body, tokens)
        chat = isinstance(body, ClassifyBody) and body.messages is not None
        whole = chat or (isinstance(body, PairBody) and self.model.head is not None)
        given = row.prompts or [""] * len(tokens)
        return fit(body, given, tokens, context, 0 if whole else self._num_after)

    @property
    def _joined(self) -> bool:
        """Whether a pair becomes one prompt by its tokenizer: not where a template does it, nor where each of its texts
        has a vector of its own."""
        return self.model.head is not None and self._template is None

    def _pair_texts(self, body: PairBody) -> tuple[list[str], bool]:
        first, second = pairs_of(body)
        extra = dict(body.chat_template_kwargs or {})
        if body.instruction is not None:
            extra.setdefault("instruction", body.instruction)
        if self.model.head is not None and self._template is not None:
            _refuse(body, ("max_tokens_per_query", "max_tokens_per_doc"), "its chat template makes a pair's prompt")
            firsts = first if len(first) > 1 else first * len(second)
            return [self._render(*pair, extra) for pair in zip(firsts, second, strict=True)], False
        _refuse(body, ("instruction", "chat_template_kwargs"), "it has no chat template of queries and documents")
        if self.model.head is None:
            _refuse(body, ("max_tokens_per_query", "max_tokens_per_doc"), "each text has a vector of its own")
        elif self._joint is None:
            raise RowError("how this model's tokenizer joins two texts is not known", "not_supported", "url")
        return [*first, *second], self.model.head is None

    def _render(self, query: str, document: str, extra: Mapping[str, Any]) -> str:
        assert self._template is not None
        turns = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return self._template.render(turns, False, template_kwargs=extra)

    def _join(self, body: PairBody, tokens: Sequence[Tokens]) -> list[Tokens]:
        """Pairs as the tokenizer joins them; words of a second text under their other numbers where the model tells."""
        assert self._joint is not None
        count = len(pairs_of(body)[0])
        firsts = [part[: body.max_tokens_per_query or None] for part in tokens[:count]]
        seconds = [part[: body.max_tokens_per_doc or None] for part in tokens[count:]]
        context, cut = self.model.vector_context, body.truncate_prompt_tokens
        most = None if cut is None else context if cut < 0 else min(cut, context)
        prompts = []
        for first, second in zip(firsts if count > 1 else firsts * len(seconds), seconds, strict=True):
            prompt, begin = self._joint.join(first, second, most)
            check_context(prompt, context, "documents")
            prompts.append(_marked(prompt, begin, self.model.vocab_size) if self.model.kinds > 1 else prompt)
        return prompts


def _marked(prompt: Tokens, begin: int, vocab_size: int) -> Tokens:
    """The prompt with the words from `begin` on under their other numbers."""
    ids = np.frombuffer(prompt, dtype=np.int32).copy()
    ids[begin:] += vocab_size
    marked = type(prompt)(TOKEN)
    marked.frombytes(ids.tobytes())
    return marked


def _refuse(body: PairBody, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(body, name):
            raise RowError(f"{name} means nothing to this model, for {why}: remove it", "not_supported", name)
