"""Which folder a model's name means, and what its small files say about requests. Loads no weights and no tensors.

It must not know how a model is computed, nor what a job is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.core.errors import ModelError, UsageError
from shoal.text.files import read_json
from shoal.text.heads import Head, read_head
from shoal.text.pooling import Pooling, decoder_pooling, first_position, is_encoder, read_pooling
from shoal.text.tokenizer import Tokenizer

EMBEDDED = Path(__file__).resolve().parents[1] / "models" / "minnow"
PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
)  # weights, configuration, templates, merges: nothing that runs
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KNOBS = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "repetition_penalty": 0.0}  # with their least


def resolve_model(name: str = "", revision: str | None = None) -> Path:
    """The folder of a model: itself, the embedded model for '', or a hub id, from the hub's cache where it is whole.

    ModelError when there is no such model here and it cannot be fetched.
    """
    if not name:
        return EMBEDDED
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is not a folder: give a checkpoint's folder or a hub id such as Qwen/Qwen2.5-0.5B")
    return _from_hub(name, revision)


def find_model(name: str, start: Path) -> Path | None:
    """The folder of a model where it is on this machine, seen from the folder `start`; nothing is fetched."""
    folder = start / Path(name).expanduser()
    if not name or folder.is_dir():
        return folder if name else EMBEDDED
    return _in_cache(name, None) if _HUB_ID.fullmatch(name) else None


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the hub's cache, where it is whole."""
    import huggingface_hub  # slow to import, and most runs name a folder
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").exists() and any(folder.glob("*.safetensors")) else None


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub  # slow to import, and most runs name a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    kept = _in_cache(name, revision)
    if kept is not None:
        return kept
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a folder nor in the hub's cache, and it cannot be fetched: {reason}. "
            "Download it where there is a network, and give its folder"
        ) from error


def weight_mode(asked: str, folder: Path) -> str:
    """The arithmetic of a model: what was asked for; for "auto" bf16 where the checkpoint has 16 bits, else fp32."""
    if asked != "auto":
        return asked
    config = read_json(folder / "config.json")
    inner = config.get("text_config") or {}
    stored = config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype")
    return "bf16" if stored in ("bfloat16", "float16") else "fp32"


def kv_mode(asked: str, weights: str) -> str:
    """How keys and values are kept under a mode of weights: as they come, unless int8 was asked for."""
    if asked == "auto":
        return "fp32" if weights == "fp32" else "bf16"
    if weights == "fp32":
        raise UsageError(f"keys and values are kept as {asked} beside 16-bit activations only: give --weights bf16 too")
    return asked


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What requests must fit, and what they get when they do not say."""

    folder: Path
    context: int  # tokens of a prompt and its answer together
    vocab_size: int  # rows of the embedding: may be more than the tokenizer has
    eos: frozenset[int]
    sampling: Mapping[str, float]  # of generation_config.json, where it says: temperature, top_k, top_p, min_p, …
    max_tokens: int | None = None  # of generation_config.json
    vector: int = 0  # numbers of the vectors that it makes; 0: it makes none
    vector_context: int = 0  # tokens of a text that becomes a vector, at most
    no_vector: str = ""  # why it makes none, where its folder says how and that cannot be done
    encoder: bool = False  # it makes no texts, and takes every text by itself
    head: Head | None = None  # it makes numbers of labels, and neither texts nor vectors
    kinds: int = 1  # of words: 2 where a second text's words have numbers of their own, after the vocabulary's

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, context: int | None = None) -> ModelInfo:
        """Read config.json and generation_config.json. ModelError for a file that is missing or not JSON."""
        config = read_json(folder / "config.json")
        if not config:
            raise ModelError(f"{folder} has no config.json: it is not a checkpoint's folder")
        inner = config.get("text_config")
        described = {**inner, **{k: v for k, v in config.items() if k in inner}} if isinstance(inner, dict) else config
        trained = _count(described, "max_position_embeddings", 131072 if isinstance(inner, dict) else None)
        if context is not None and context < 1:
            raise UsageError(f"a context of {context} tokens holds nothing: give at least 1")
        encoder, head = is_encoder(config), read_head(config)
        if encoder:
            trained -= first_position(config)
        pooling = None if head else read_pooling(folder) if encoder else decoder_pooling(folder)
        limit = (pooling.most_tokens if isinstance(pooling, Pooling) else None) or trained
        if encoder:
            context = min(context or trained, trained, limit)
        context = context or trained
        generation = read_json(folder / "generation_config.json")
        answer = generation.get("max_new_tokens")
        return cls(
            folder=folder,
            context=context,
            vocab_size=_count(described, "vocab_size", 262208 if isinstance(inner, dict) else None),
            eos=tokenizer.eos,
            sampling=_sampling(generation),
            max_tokens=answer if isinstance(answer, int) and answer > 0 else None,
            vector=_count(described, "hidden_size", None) if isinstance(pooling, Pooling) else 0,
            vector_context=min(context, limit),
            no_vector=str(pooling) if isinstance(pooling, ModelError) else "",
            encoder=encoder,
            head=head,
            kinds=min(_count(config, "type_vocab_size", 2), 2) if config.get("model_type") == "bert" else 1,
        )


def _count(values: Mapping[str, Any], name: str, default: int | None) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {name} must be a positive whole number, found {value!r}")
    return value


def _sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """The knobs it sets; temperature 0 where it says that the model is not to be sampled from."""
    knobs: dict[str, float] = {}
    for name, least in _KNOBS.items():
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least:
            knobs[name] = value
    if generation.get("do_sample") is False:
        knobs["temperature"] = 0.0
    return knobs
