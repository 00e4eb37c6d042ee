"""What makes one decoder differ from another, as data, read from a checkpoint's config.json.

It knows the configuration files of the supported architectures (as written by transformers 4 and 5), and must not
know tensors: a difference is a field that one `Decoder` obeys, never a class of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoal.core.errors import ModelError, UsageError
from shoal.kernels.api import Activation
from shoal.nn.rope import Rope, make_rope

Norms = Literal["pre", "post", "both"]
QueryKeyNorm = Literal["none", "head", "width"]


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """How one layer looks at positions."""

    window: int = 0  # positions seen, the token's own included; 0 sees all
    rope: int | None = 0  # index into ModelConfig.ropes; None: positions are not encoded


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder. Sizes are counts of numbers, `context` of tokens."""

    architecture: str  # model_type of the checkpoint
    vocab_size: int
    width: int  # D, of the residual stream
    inner: int  # of the feed-forward layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[Rope, ...]
    context: int  # positions that may be used; settles length-dependent rope scaling
    norm_eps: float
    attention_scale: float  # of the scores q·k
    tied: bool = False  # logits are computed with the embedding table
    norms: Norms = "pre"  # before each branch, after it, or both
    norm_offset: float = 0.0  # added to every norm's weight
    qk_norm: QueryKeyNorm = "none"  # of queries and keys: none, head by head, or over all heads at once
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # the checkpoint holds q, k, v in one tensor, gate and up in another
    activation: Activation = "silu"
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of each branch before it is added
    logit_divisor: float = 1.0
    labels: int = 0  # numbers that its head makes of a text's last position; 0: the head makes logits of words

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class _Family:
    """What config.json does not say: fixed traits of an architecture, and values that it may leave out."""

    architecture: str
    windows: Literal["none", "all", "upper", "alternate", "pattern", "unrotated"] = "none"
    norms: Norms = "pre"
    norm_offset: float = 0.0
    qk_norm: QueryKeyNorm = "none"
    qkv_bias: bool | None = None  # None: attention_bias decides
    output_bias: bool | None = None
    fused: bool = False
    scaled_embedding: bool = False
    local_rope: bool = False  # windowed layers have a rope of their own
    defaults: Mapping[str, object] = field(default_factory=dict)

    def named(self, names: list[object]) -> bool:
        """Whether one of the names is the architecture's, or its classifier's."""
        base = self.architecture.removesuffix("ForCausalLM")
        return not {self.architecture, base + CLASSIFIER, f"{base}Text{CLASSIFIER}"}.isdisjoint(map(str, names))


_GEMMA = {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip

FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM", windows="all", qkv_bias=False, output_bias=False),
    "qwen2": _Family("Qwen2ForCausalLM", windows="upper", qkv_bias=True, output_bias=False),
    "qwen3": _Family("Qwen3ForCausalLM", windows="upper", qk_norm="head", defaults={"head_dim": 128}),
    "phi3": _Family(
        "Phi3ForCausalLM", windows="all", qkv_bias=False, output_bias=False, fused=True,
        defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "gemma2": _Family(
        "Gemma2ForCausalLM", windows="alternate", norms="both", norm_offset=1.0, scaled_embedding=True,
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": _Family(
        "Gemma3ForCausalLM", windows="pattern", norms="both", norm_offset=1.0, qk_norm="head", scaled_embedding=True,
        local_rope=True,
        defaults={**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6},
    ),
    "olmo2": _Family("Olmo2ForCausalLM", norms="post", qk_norm="width", defaults={"rms_norm_eps": 1e-5}),
    "granite": _Family("GraniteForCausalLM"),
    "smollm3": _Family(
        "SmolLM3ForCausalLM", windows="unrotated", defaults={"rope_theta": 2e6, "tie_word_embeddings": True}
    ),
}  # fmt: skip

CLASSIFIER = "ForSequenceClassification"  # ends the names of architectures whose head makes numbers of labels
_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}


class Fields:
    """config.json with an architecture's defaults below it; every read is checked."""

    def __init__(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self.values = {**defaults, **{k: v for k, v in values.items() if v is not None}}

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be a number, found {value!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value) or value <= 0:
            raise ModelError(f"config.json: {name} must be a positive whole number, found {value!r}")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be true or false, found {value!r}")
        return value

    def group(self, name: str) -> Mapping[str, object]:
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise ModelError(f"config.json: {name} must be an object, found {value!r}")
        return value

    def per_layer(self, name: str, num_layers: int) -> list[object] | None:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, list) or len(value) < num_layers):
            raise ModelError(f"config.json: {name} must list all {num_layers} layers, found {value!r}")
        return value


def read_config(folder: str | Path, context: int | None = None) -> ModelConfig:
    """Read the decoder that a checkpoint folder describes.

    `context` is how many positions will be used; None means max_position_embeddings. ModelError names what is
    unknown, missing or of the wrong type.
    """
    return make_config(read_values(folder), context)


def read_values(folder: str | Path) -> Mapping[str, object]:
    """What config.json of a checkpoint folder holds. ModelError when it is not there or no JSON object."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); a model folder holds config.json") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return values


def make_config(values: Mapping[str, object], context: int | None = None) -> ModelConfig:
    """Turn the contents of config.json into a ModelConfig. Errors as in `read_config`."""
    whole = values
    name, family, values = _find_family(values)
    raw = Fields(values, family.defaults)
    num_heads = raw.count("num_attention_heads")
    width = raw.count("hidden_size")
    head_dim = raw.count("head_dim", width // num_heads)
    trained = raw.count("max_position_embeddings")
    if context is None:
        context = trained
    if context < 1:
        raise UsageError(f"a context of {context} tokens holds nothing: give at least 1")
    num_kv_heads = raw.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} attention heads are not a multiple of {num_kv_heads} key heads")
    bias = raw.flag("attention_bias")
    scale = raw.number("query_pre_attn_scalar", head_dim) ** -0.5
    return ModelConfig(
        architecture=name,
        vocab_size=raw.count("vocab_size"),
        width=width,
        inner=raw.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=_read_layers(raw, family),
        ropes=_read_ropes(raw, family, head_dim, trained, context),
        context=context,
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        attention_scale=raw.number("attention_multiplier", 1.0) if name == "granite" else scale,
        tied=raw.flag("tie_word_embeddings"),
        norms=family.norms,
        norm_offset=family.norm_offset,
        qk_norm=family.qk_norm,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=raw.flag("mlp_bias"),
        fused=family.fused,
        activation=_read_activation(raw),
        attention_softcap=raw.number("attn_logit_softcapping", 0.0),
        logit_softcap=raw.number("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(width) if family.scaled_embedding else raw.number("embedding_multiplier", 1.0),
        residual_scale=raw.number("residual_multiplier", 1.0),
        logit_divisor=raw.number("logits_scaling", 1.0),
        labels=num_labels(whole),
    )


def num_labels(values: Mapping[str, object]) -> int:
    """How many numbers a classifier's head makes, as transformers reads it; 0 for a model that is none."""
    names, labels = values.get("architectures"), values.get("id2label")
    if not isinstance(names, list) or not any(str(name).endswith(CLASSIFIER) for name in names):
        return 0
    return len(labels) if isinstance(labels, dict) and labels else Fields(values, {}).count("num_labels", 2)


def _find_family(values: Mapping[str, object]) -> tuple[str, _Family, Mapping[str, object]]:
    """The family by model_type, and the values that describe the decoder (a text_config inside, for Gemma 3)."""
    kind = values.get("model_type")
    names = values.get("architectures") or []
    if "quantization_config" in values:
        raise ModelError("config.json has a quantization_config: quantized checkpoints are not read; use the original")
    if kind == "gemma3" and isinstance(values.get("text_config"), dict):
        inside = dict(values["text_config"])  # type: ignore[call-overload]
        return "gemma3_text", FAMILIES["gemma3_text"], {"tie_word_embeddings": True, **inside}
    if not isinstance(kind, str):
        kind = next((k for k, f in FAMILIES.items() if isinstance(names, list) and f.named(names)), None)
    family = FAMILIES.get(kind or "")
    fits = family is not None and isinstance(names, list) and (not names or family.named(names))
    if kind is None or family is None or not fits:
        known = ", ".join(f"{k} ({f.architecture})" for k, f in FAMILIES.items())
        custom = " The folder's own code is never run." if "auto_map" in values else ""
        raise ModelError(f"architecture {names or kind} (model_type {kind!r}) is not supported.{custom} Known: {known}")
    return kind, family, values


def _read_activation(raw: Fields) -> Activation:
    name = raw.values.get("hidden_activation", raw.values.get("hidden_act", "silu"))
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(f"config.json: activation {name!r} is not supported: known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _read_layers(raw: Fields, family: _Family) -> tuple[LayerConfig, ...]:
    num_layers = raw.count("num_hidden_layers")
    window = 0
    optional = family.windows in ("upper", "unrotated") and not raw.flag("use_sliding_window")
    if family.windows != "none" and not optional and "sliding_window" in raw.values:
        window = raw.count("sliding_window")
    rotated = raw.per_layer("no_rope_layers", num_layers)
    interval = raw.count("no_rope_layer_interval", 4)
    kinds = raw.per_layer("layer_types", num_layers)
    layers = []
    for index in range(num_layers):
        rope = True
        if family.windows == "unrotated":
            rope = bool(rotated[index]) if rotated else bool((index + 1) % interval)
        kind = kinds[index] if kinds and family.windows != "all" else _usual_kind(raw, family, index, rope)
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: layer type {kind!r} of layer {index} is not supported")
        sliding = kind == "sliding_attention"
        which = 1 if sliding and family.local_rope else 0
        layers.append(LayerConfig(window if sliding else 0, which if rope else None))
    return tuple(layers)


def _usual_kind(raw: Fields, family: _Family, index: int, rope: bool) -> str:
    sliding = {
        "none": False,
        "all": True,
        "upper": index >= raw.count("max_window_layers", 28),
        "alternate": index % 2 == 0,
        "pattern": (index + 1) % raw.count("sliding_window_pattern", 6) != 0,
        "unrotated": not rope,
    }[family.windows]
    return "sliding_attention" if sliding else "full_attention"


def _read_ropes(raw: Fields, family: _Family, head_dim: int, trained: int, context: int) -> tuple[Rope, ...]:
    """The rope of all layers, or of full and of windowed layers."""
    given = raw.group("rope_parameters") or raw.group("rope_scaling")
    both = given if "full_attention" in given else {"full_attention": given}
    common = {"rope_theta": raw.number("rope_theta", 10000.0)}
    if "partial_rotary_factor" in raw.values:
        common["partial_rotary_factor"] = raw.number("partial_rotary_factor")
    whole = {**common, **Fields(both, family.defaults).group("full_attention")}
    if family.fused:
        whole["original_max_position_embeddings"] = raw.count("original_max_position_embeddings")
        if whole.get("rope_type", whole.get("type")) == "yarn":
            whole["rope_type"] = "longrope"
    ropes = [make_rope(whole, head_dim, trained, context)]
    if family.local_rope:
        common["rope_theta"] = raw.number("rope_local_base_freq", 10000.0)
        local = {**common, **Fields(both, family.defaults).group("sliding_attention")}
        ropes.append(make_rope(local, head_dim, trained, context))
    return tuple(ropes)
