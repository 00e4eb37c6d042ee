"""An encoder as data, read from a checkpoint's config.json: the layout of BERT, every option of which is checked.

It must not know tensors, nor what is made of the last layer's rows: that stands in other files of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.core.errors import ModelError
from shoal.nn.arch import Fields

ACTIVATION = "gelu"  # its exact form, of all that config.json could name

_DEFAULTS: Mapping[str, object] = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
_ONLY: Mapping[str, object] = {
    "hidden_act": ACTIVATION, "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
}  # fmt: skip
_HEADLESS = ("BertModel", "BertForMaskedLM")  # the latter's head predicts words, and is left in its file


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """One encoder. Sizes are counts of numbers."""

    architecture: str  # model_type of the checkpoint
    vocab_size: int
    width: int  # D
    inner: int  # of the feed-forward layer
    num_heads: int
    num_layers: int
    positions: int  # rows of the table of positions
    kinds: int  # rows of the table of kinds of segments, of which the first is used
    norm_eps: float

    @property
    def attention_scale(self) -> float:
        """Of the scores q·k."""
        return float((self.width // self.num_heads) ** -0.5)


def make_encoder_config(values: Mapping[str, object]) -> EncoderConfig:
    """Turn the contents of config.json into an EncoderConfig. ModelError names what is unknown, missing or wrong."""
    names = values.get("architectures") or []
    if values.get("model_type") != "bert" or not isinstance(names, list) or not set(names) <= set(_HEADLESS):
        raise ModelError(f"architecture {names} is not an encoder that is supported: known are {', '.join(_HEADLESS)}")
    raw = Fields(values, _DEFAULTS)
    for name, only in _ONLY.items():
        found = raw.values.get(name, only)
        if found != only:
            raise ModelError(f"config.json: {name} {found!r} is not supported in an encoder: it must be {only!r}")
    width, num_heads = raw.count("hidden_size"), raw.count("num_attention_heads")
    if width % num_heads:
        raise ModelError(f"config.json: a hidden_size of {width} cannot be cut into {num_heads} attention heads")
    return EncoderConfig(
        architecture="bert",
        vocab_size=raw.count("vocab_size"),
        width=width,
        inner=raw.count("intermediate_size"),
        num_heads=num_heads,
        num_layers=raw.count("num_hidden_layers"),
        positions=raw.count("max_position_embeddings"),
        kinds=raw.count("type_vocab_size"),
        norm_eps=raw.number("layer_norm_eps"),
    )


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the encoder needs, named without the checkpoint's prefix, with its shape."""
    width, inner = config.width, config.inner
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.positions, width),
        "embeddings.token_type_embeddings.weight": (config.kinds, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    linears = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
    linears |= {
        "attention.output.dense": (width, width), "intermediate.dense": (inner, width), "output.dense": (width, inner),
    }  # fmt: skip
    for index in range(config.num_layers):
        layer = f"encoder.layer.{index}"
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
    return shapes


def may_be_left(name: str) -> bool:
    """Whether a tensor is part of such a checkpoint and of nothing that an embedding needs."""
    return name == "embeddings.position_ids" or name.startswith(("pooler.", "cls."))
