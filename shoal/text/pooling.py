"""How a checkpoint's vectors are made of its last layer, as the small files of sentence-transformers say.

It must not know how a model is computed. What these files ask for and is not known here is refused: another vector than
the one that was trained would be wrong in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shoal.core.errors import ModelError
from shoal.text.files import read_json

# Values of model_type whose tokens see the whole text: such a model makes vectors, never a text.
ENCODERS = ("bert", "roberta", "xlm-roberta")
MODULES = "modules.json"
LIMITS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"

Kind = Literal["mean", "cls", "last"]

_FLAGS: Mapping[str, Kind] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
}  # fmt: skip
_NAMES: Mapping[str, Kind] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """From the last layer's rows to a vector."""

    kind: Kind
    normalize: bool
    most_tokens: int | None  # of a text, special tokens included; None: as many as there are positions
    files: tuple[Path, ...]  # that say so


FIRST = Pooling("cls", False, None, ())
"""What the head of an encoder's classifier is given, whatever the folder's files say of embeddings."""


def is_encoder(config: Mapping[str, object]) -> bool:
    """Whether config.json is of a model that makes vectors only."""
    return config.get("model_type") in ENCODERS


def first_position(config: Mapping[str, object]) -> int:
    """The row of an encoder's table of positions that is a text's first: RoBERTa's come after its padding's."""
    padding = config.get("pad_token_id")
    return 0 if config.get("model_type") == "bert" else (padding if isinstance(padding, int) else 1) + 1


def makes_vectors(folder: Path) -> bool:
    """Whether the folder says how its model's vectors are made. A decoder's may, and it still makes texts."""
    return (folder / MODULES).is_file()


def read_pooling(folder: Path, encoder: bool = True) -> Pooling:
    """What the folder's files say. ModelError for a folder without them, and for anything in them that is not known.

    Of a decoder only the last token has seen the whole text, and only its row is kept until the end.
    """
    pooling, normalize = folder, False
    for module in _modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = folder / str(module.get("path"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(f"{folder / MODULES}: a module of type {module.get('type')!r} is not supported")
    if pooling == folder:
        raise ModelError(f"{folder / MODULES} names no Pooling module: how its vectors are made is not known")
    files = [folder / MODULES, pooling / "config.json"]
    limits, prompts = read_json(folder / LIMITS), read_json(folder / PROMPTS)
    files += [folder / name for name, found in ((LIMITS, limits), (PROMPTS, prompts)) if found]
    most = limits.get("max_seq_length")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ModelError(f"{folder / LIMITS}: max_seq_length must be a positive whole number, found {most!r}")
    if limits.get("do_lower_case") and not read_json(folder / "tokenizer_config.json").get("do_lower_case"):
        raise ModelError(f"{folder / LIMITS}: do_lower_case is not supported where the tokenizer keeps capitals")
    if prompts.get("default_prompt_name") is not None:
        raise ModelError(f"{folder / PROMPTS}: a default prompt is not supported: put it before each text instead")
    kind = _kind(pooling / "config.json")
    if not encoder and kind != "last":
        raise ModelError(f"{pooling / 'config.json'}: over a decoder pooling is by lasttoken, and not by {kind}")
    return Pooling(kind, normalize, most, tuple(files))


def decoder_pooling(folder: Path) -> Pooling | ModelError | None:
    """How a decoder's vectors are made: None where the folder does not say, and why not where that cannot be done.

    The latter is for whoever asks for vectors: texts need none of it.
    """
    try:
        return read_pooling(folder, encoder=False) if makes_vectors(folder) else None
    except ModelError as error:
        return error


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{folder} has no {MODULES}, which says how an encoder's last layer becomes a vector: give the folder of a"
            " sentence-transformers model"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path} should hold a list of objects: fetch the checkpoint again")
    return modules


def _kind(path: Path) -> Kind:
    """The one way of pooling that is switched on."""
    config = read_json(path)
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    named = config.get("pooling_mode")
    if not on and isinstance(named, str) and named in _NAMES:
        return _NAMES[named]
    if len(on) != 1 or on[0] not in _FLAGS:
        asked = ", ".join(on) or named or "nothing"
        raise ModelError(f"{path}: pooling by {asked} is not supported: known are {', '.join(_FLAGS)}, one at a time")
    return _FLAGS[on[0]]
