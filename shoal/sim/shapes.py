"""Dimensions of models as data: what a step multiplies, reads and keeps, counted and not measured.

It knows published configurations; it must not know hardware, seconds or a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Product(NamedTuple):
    """A product of every token's `inputs` numbers with a matrix, for `outputs` numbers each."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder. Sizes are counts of numbers."""

    name: str
    layers: int
    width: int  # of the residual stream
    inner: int  # of the feed-forward layer, or of one expert
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True  # the feed-forward layer has a gate beside its first product
    tied: bool = False  # logits are computed with the embedding table
    experts: int = 1
    chosen: int = 1  # experts of each token
    window: int = 0  # positions seen, the token's own included; 0 sees all

    def products(self, tensor: int = 1) -> tuple[Product, ...]:
        """The products of a layer but the feed-forward ones, on one of `tensor` devices that share each layer."""
        heads, kv_heads = self.heads / tensor, max(self.kv_heads / tensor, 1)
        rows = math.ceil((heads + 2 * kv_heads) * self.head_dim)
        return Product("query, key, value", self.width, rows), Product(
            "output", math.ceil(heads * self.head_dim), self.width
        )

    def forward(self, tensor: int = 1) -> tuple[Product, ...]:
        """The products of the feed-forward layer, or of one expert, on one of `tensor` devices."""
        inner = math.ceil(self.inner / tensor)
        return Product("up", self.width, (1 + self.gated) * inner), Product("down", inner, self.width)

    def touched(self, tokens: float) -> float:
        """Experts that some token of so many chose, expected where each token chooses evenly."""
        if self.experts == 1:
            return 1.0
        return self.experts * (1.0 - math.pow(1.0 - self.chosen / self.experts, tokens))

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of a layer."""
        own = sum(each.inputs * each.outputs for each in self.products())
        return own + self.experts * sum(each.inputs * each.outputs for each in self.forward())

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocabulary * self.width

    def kv_numbers(self, tensor: int = 1) -> float:
        """Numbers that a position keeps in a layer, on one of `tensor` devices."""
        return 2 * max(self.kv_heads / tensor, 1) * self.head_dim


def shape_of(name: str, values: Mapping[str, object]) -> Shape:
    """The shape that the values of a config.json describe. KeyError names what is missing."""

    def count(*names: str) -> int:
        for each in names:
            found = values.get(each)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
        raise KeyError(f"config.json: none of {', '.join(names)} is a whole number")

    def count_or(default: int, *names: str) -> int:
        return count(*names) if any(isinstance(values.get(each), int) for each in names) else default

    width, heads = count("hidden_size", "n_embd"), count("num_attention_heads", "n_head")
    experts = count_or(1, "num_local_experts", "num_experts")
    dense_inner = ("intermediate_size", "ffn_dim")
    return Shape(
        name, count("num_hidden_layers", "n_layer"), width,
        count(*(("moe_intermediate_size",) if experts > 1 else ()), *dense_inner), heads,
        count_or(heads, "num_key_value_heads"), count_or(width // heads, "head_dim"), count("vocab_size"),
        gated=values.get("model_type") not in {"opt", "gpt2", "bloom", "falcon"},
        tied=values.get("tie_word_embeddings") is True, experts=experts,
        chosen=count_or(1, "num_experts_per_tok") if experts > 1 else 1,
        window=count_or(0, "sliding_window") if values.get("use_sliding_window", True) else 0,
    )  # fmt: skip


# From the config.json that each model is published with; GPT-3 from table 2.1 of arXiv 2005.14165, OPT from table 1 of
# arXiv 2205.01068, Falcon-180B from table 13 of arXiv 2311.16867 (its config.json has the same).
SHAPES: Mapping[str, Shape] = {
    each.name: each
    for each in (
        Shape("minnow", 4, 256, 512, 4, 2, 64, 4096),
        Shape("llama-130m", 12, 768, 2304, 12, 4, 64, 32000),
        Shape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
        Shape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000, window=4096),
        Shape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        Shape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000),
        Shape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000),
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        Shape("llama-33b", 60, 6656, 17920, 52, 52, 128, 32000),
        Shape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064),
        Shape("yi-34b", 60, 7168, 20480, 56, 8, 128, 64000),
        Shape("opt-13b", 40, 5120, 20480, 40, 40, 128, 50272, gated=False, tied=True),
        Shape("opt-66b", 64, 9216, 36864, 72, 72, 128, 50272, gated=False, tied=True),
        Shape("opt-175b", 96, 12288, 49152, 96, 96, 128, 50272, gated=False, tied=True),
        Shape("gpt-3", 96, 12288, 49152, 96, 96, 128, 50257, gated=False, tied=True),
        Shape("bloom-176b", 70, 14336, 57344, 112, 112, 128, 250880, gated=False, tied=True),
        Shape("falcon-180b", 80, 14848, 59392, 232, 8, 64, 65024, gated=False),
        Shape("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, experts=8, chosen=2),
        Shape("qwen3-30b-a3b", 48, 2048, 768, 32, 4, 128, 151936, experts=128, chosen=8),
    )
}
