"""How large a model is, from its config.json alone: bytes of weights, and of keys and values. Loads no tensors.

It must not know how a model is computed; what it cannot compute is refused when the model is loaded, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.core.errors import ModelError
from shoal.text.files import read_json
from shoal.text.heads import read_head

PANEL = 32  # numbers up to a multiple of which the compiled kernels fill a head
_HEADS = {"gemma2": 256, "gemma3": 256, "gemma3_text": 256, "qwen3": 128}  # numbers of a head, where it is left out
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "tie_word_embeddings": True}
_TIED = ("gemma2", "gemma3", "gemma3_text", "smollm3")
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5, "int4-a16": 0.5}  # of one weight of a layer
HEAD = "+head"  # ends the modes whose head is kept in 8 bits, beside the embedding even where the two are tied


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of numbers that decide what a model takes."""

    num_layers: int
    width: int
    inner: int  # of the feed-forward layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # no head of its own: the embedding is the head, or a classifier's is, which is next to nothing

    @classmethod
    def load(cls, folder: Path) -> Sizes:
        """Read config.json. ModelError for a number that is missing."""
        config = read_json(folder / "config.json")
        kind = str(config.get("model_type"))
        inner = config.get("text_config")
        values = {**_GEMMA, **inner} if isinstance(inner, dict) else config
        heads = _count(values, "num_attention_heads", 8 if kind in _TIED else None)
        width = _count(values, "hidden_size")
        return cls(
            num_layers=_count(values, "num_hidden_layers"),
            width=width,
            inner=_count(values, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=_count(values, "num_key_value_heads", 4 if kind.startswith("gemma") else heads),
            head_dim=_count(values, "head_dim", _HEADS.get(kind, width // heads)),
            vocab_size=_count(values, "vocab_size", 262208 if kind.startswith("gemma3") else None),
            tied=bool(values.get("tie_word_embeddings", kind in _TIED)) or read_head(config) is not None,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers inside one layer."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.width * (2 * queries + 2 * keys + 3 * self.inner)

    def weight_bytes(self, mode: str) -> int:
        """Bytes of a loaded model, biases, norms and scales of quantised weights left out: a hundredth, about."""
        kept = self.vocab_size * self.width * (4 if mode == "fp32" else 2)  # of one table
        head = self.vocab_size * self.width if mode.endswith(HEAD) else 0 if self.tied else kept
        return int(self.num_layers * self.layer_weights * _BYTES[mode.removesuffix(HEAD)]) + kept + head

    def position_bytes(self, kv: str) -> int:
        """Bytes of the keys and values of one position in all layers, as the compiled kernels keep them."""
        filled = self.head_dim + -self.head_dim % PANEL
        one = {"fp32": 4 * filled, "bf16": 2 * filled, "int8": filled + 4}[kv]
        return 2 * self.num_layers * self.num_kv_heads * one


def _count(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {name} must be a positive whole number, found {value!r}")
    return value
