"""A tokenizer whose tokens are bytes and a template of two lines: enough text for tests without a model."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.core.errors import RowError
from shoal.core.types import TOKEN
from shoal.jobs.encode import RowEncoder
from shoal.jobs.settings import JobSettings
from shoal.text.checkpoint import ModelInfo
from shoal.text.tools import Style

BOS, EOS, FIRST = 0, 1, 2
VOCAB_SIZE = FIRST + 256


class ByteTokenizer:
    """Token FIRST + b stands for byte b."""

    hash = "bytes"
    eos = frozenset((EOS,))
    num_after = 0
    joint = None

    def encode(self, text: str, special: bool = True) -> array[int]:
        return array(TOKEN, [BOS] * special + [FIRST + b for b in text.encode()])

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[array[int]]:
        return [self.encode(text, special) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - FIRST]) if token >= FIRST else b""


class PlainTemplate:
    """role: content, line by line; refuses an assistant who speaks first."""

    hash = "plain"
    style: Style | None = None
    pairs = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[0]["role"] == "assistant" and not continue_final_message:
            raise RowError("the chat template refuses these messages: the user speaks first", "chat_template")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return text[:-1] if continue_final_message else text + "assistant: " * add_generation_prompt


def model_info(context: int = 512, **sampling: float) -> ModelInfo:
    """A model's description that fits ByteTokenizer."""
    return ModelInfo(Path("."), context, VOCAB_SIZE, frozenset((EOS,)), sampling)


def row_encoder(settings: JobSettings | None = None, context: int = 512, **sampling: float) -> RowEncoder:
    """An encoder over bytes."""
    return RowEncoder(ByteTokenizer(), PlainTemplate(), model_info(context, **sampling), settings or JobSettings())
