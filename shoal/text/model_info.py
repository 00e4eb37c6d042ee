"""What must be known of a checkpoint before any tensor is loaded: its limits, special tokens and sampling defaults.

It knows config.json and generation_config.json, as written by transformers 4 and 5; it must not know tensors, nor
whether the architecture can be run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shoal.core.errors import ModelError

_STRETCHED = ("linear", "dynamic", "yarn")  # rope scalings whose factor multiplies the trained length


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How the checkpoint's makers sample when the caller says nothing. None: they do not say either."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The facts of one model folder. Lengths are tokens."""

    architecture: str  # model_type
    context: int  # the longest prompt with its answer
    vocab_size: int
    bos: int | None
    eos: frozenset[int]  # of both files: any of them ends an answer
    pad: int | None
    dtype: str  # type of the saved tensors, such as "bfloat16"; '' when the file does not say
    kv_numbers_per_token: int  # keys and values of one token in all layers; 0 when the file does not say
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @classmethod
    def load(cls, folder: str | Path) -> ModelInfo:
        """Read a model folder. ModelError names the file that is missing or the value that cannot be."""
        config = _read(Path(folder) / "config.json", required=True)
        generation = _read(Path(folder) / "generation_config.json", required=False)
        inside = config.get("text_config")
        if isinstance(inside, dict):
            config = {**config, **inside}
        heads = _count(config, "num_attention_heads", 0)
        width = _count(config, "head_dim", 0) or (_count(config, "hidden_size", 0) // heads if heads else 0)
        layers = _count(config, "num_hidden_layers", 0)
        return cls(
            architecture=str(config.get("model_type", "")),
            context=_context(config),
            vocab_size=_count(config, "vocab_size"),
            bos=_token(generation, "bos_token_id") if "bos_token_id" in generation else _token(config, "bos_token_id"),
            eos=_tokens(generation, "eos_token_id") | _tokens(config, "eos_token_id"),
            pad=_token(generation, "pad_token_id") if "pad_token_id" in generation else _token(config, "pad_token_id"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
            kv_numbers_per_token=2 * layers * _count(config, "num_key_value_heads", heads) * width,
            defaults=_defaults(generation),
        )


def _read(path: Path, *, required: bool) -> Mapping[str, object]:
    if not required and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); a model folder holds {path.name}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return {name: value for name, value in values.items() if value is not None}


def _context(config: Mapping[str, object]) -> int:
    """The trained length, stretched where the rope scaling says so."""
    default = 131072 if str(config.get("model_type", "")).startswith("gemma3") else None
    trained = _count(config, "max_position_embeddings", default)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in _STRETCHED:
        return trained
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", trained)
    if not isinstance(factor, (int, float)) or not isinstance(original, (int, float)):
        return trained
    return max(trained, int(original * factor))


def _count(config: Mapping[str, object], name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"config.json: {name} must be a whole number, found {value!r}")
    return value


def _tokens(values: Mapping[str, object], name: str) -> frozenset[int]:
    value = values.get(name, [])
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise ModelError(f"{name} must be a token id or a list of them, found {value!r}")
    return frozenset(found)


def _token(values: Mapping[str, object], name: str) -> int | None:
    return min(_tokens(values, name), default=None)


def _defaults(generation: Mapping[str, object]) -> GenerationDefaults:
    """Numbers count only when they are numbers: some checkpoints ship files edited by hand."""

    def number(name: str) -> float | None:
        value = generation.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    top_k, max_new_tokens = number("top_k"), number("max_new_tokens")
    return GenerationDefaults(
        do_sample=generation.get("do_sample") is True,
        temperature=number("temperature"),
        top_k=None if top_k is None else int(top_k),
        top_p=number("top_p"),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
    )
