"""An encoder as data, read from a checkpoint's config.json: the layout of BERT and RoBERTa, every option checked.

It must not know tensors, nor what is made of the last layer's rows: that stands in other files of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.core.errors import ModelError
from shoal.nn.arch import CLASSIFIER, Fields, num_labels

ACTIVATION = "gelu"  # its exact form, of all that config.json could name

_DEFAULTS: Mapping[str, object] = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
_ONLY: Mapping[str, object] = {
    "hidden_act": ACTIVATION, "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
}  # fmt: skip
_NAMES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}  # of architectures, by model_type
_USES = ("Model", "ForMaskedLM", CLASSIFIER)  # what follows; a head that predicts words is left in its file


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
    begin: int  # row of a text's first token
    kinds: int  # rows of the table of kinds of segments: the first text's, the second's
    norm_eps: float
    labels: int = 0  # numbers that its head makes of a text; 0: it has none

    @property
    def attention_scale(self) -> float:
        """Of the scores q·k."""
        return float((self.width // self.num_heads) ** -0.5)

    @property
    def context(self) -> int:
        """Tokens that a text may have."""
        return self.positions - self.begin

    @property
    def used_kinds(self) -> int:
        """Kinds of segments that texts are made of: RoBERTa marks a second one by what stands before it alone."""
        return min(self.kinds, 2) if self.architecture == "bert" else 1

    @property
    def num_words(self) -> int:
        """Words of all kinds: those of a second segment have numbers of their own, after all of the first's."""
        return self.vocab_size * self.used_kinds

    @property
    def head(self) -> tuple[str, str]:
        """The layers of a classifier's head."""
        if self.architecture == "bert":
            return "pooler.dense", "classifier"
        return "classifier.dense", "classifier.out_proj"


def make_encoder_config(values: Mapping[str, object]) -> EncoderConfig:
    """Turn the contents of config.json into an EncoderConfig. ModelError names what is unknown, missing or wrong."""
    names, kind = values.get("architectures") or [], str(values.get("model_type"))
    if kind not in _NAMES or not isinstance(names, list) or not set(names) <= {_NAMES[kind] + use for use in _USES}:
        known = ", ".join(f"{name}({'|'.join(_USES)})" for name in _NAMES.values())
        raise ModelError(f"architecture {names} is not an encoder that is supported: known are {known}")
    raw = Fields(values, _DEFAULTS)
    for name, only in _ONLY.items():
        found = raw.values.get(name, only)
        if found != only:
            raise ModelError(f"config.json: {name} {found!r} is not supported in an encoder: it must be {only!r}")
    width, num_heads = raw.count("hidden_size"), raw.count("num_attention_heads")
    if width % num_heads:
        raise ModelError(f"config.json: a hidden_size of {width} cannot be cut into {num_heads} attention heads")
    return EncoderConfig(
        architecture=kind,
        vocab_size=raw.count("vocab_size"),
        width=width,
        inner=raw.count("intermediate_size"),
        num_heads=num_heads,
        num_layers=raw.count("num_hidden_layers"),
        positions=raw.count("max_position_embeddings"),
        begin=0 if kind == "bert" else int(raw.number("pad_token_id", 1)) + 1,
        kinds=raw.count("type_vocab_size"),
        norm_eps=raw.number("layer_norm_eps"),
        labels=num_labels(values),
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
    if config.labels:
        dense, out = config.head
        shapes |= {f"{dense}.weight": (width, width), f"{dense}.bias": (width,)}
        shapes |= {f"{out}.weight": (config.labels, width), f"{out}.bias": (config.labels,)}
    return shapes


def may_be_left(name: str) -> bool:
    """Whether a tensor is part of such a checkpoint and of nothing that a vector needs."""
    return name == "embeddings.position_ids" or name.startswith(("pooler.", "cls.", "lm_head."))
