"""A checkpoint's tensors: which must be there, in what shape, and where they lie in its safetensors files.

It knows names and files, and must not know what the tensors are used for. Files are memory-mapped and read tensor by
tensor, so that loading never holds more than the model and one tensor. Pickle files are never opened: they run code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.core.errors import ModelError
from shoal.kernels.api import Mode
from shoal.kernels.quantize import weight_bytes
from shoal.nn.arch import ModelConfig
from shoal.nn.encoder_arch import EncoderConfig, encoder_shapes, may_be_left

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Names of the arithmetic of plain weights."""

KV_DTYPES = {**DTYPES, "int8": torch.int8}
"""Names of what keys and values are kept as."""


class Arithmetic(NamedTuple):
    """What a model is computed in."""

    dtype: torch.dtype  # of activations and embeddings
    mode: Mode  # of the layers' linears
    head: Mode = "plain"


MODES: Mapping[str, Arithmetic] = {
    **{name: Arithmetic(dtype, "plain") for name, dtype in DTYPES.items()},
    "int8": Arithmetic(torch.bfloat16, "int8"),
    "int8+head": Arithmetic(torch.bfloat16, "int8", "int8-a16"),
    "int4": Arithmetic(torch.bfloat16, "int4"),
    "int4+head": Arithmetic(torch.bfloat16, "int4", "int8-a16"),
    "int4-a16": Arithmetic(torch.bfloat16, "int4-a16"),
}
"""Every arithmetic a model can run in. Unless it is asked for, the head keeps the activations' dtype, as embeddings
always do: both are few in a large model, and the head decides between near tokens."""

_READABLE = ("F32", "BF16", "F16")
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "bert.", "roberta.")
_LAYER = re.compile(r"(encoder\.)?layers?\.")
_FOREIGN = ("vision_tower.", "multi_modal_projector.")  # the picture half of a checkpoint whose text half we run
_MAPPED_BYTES = 64 << 20  # read through one mapping of a file
_CONVERT = (
    "only safetensors are read, as pickle files can run code; convert it where you trust it: python -c "
    "\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('IN').save_pretrained('OUT')\""
)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the decoder needs, named without the checkpoint's prefix, with its shape."""
    width, inner = config.width, config.inner
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears: dict[str, tuple[int, int, bool]] = {
        "self_attn.o_proj": (width, queries, config.output_bias),
        "mlp.down_proj": (width, inner, config.mlp_bias),
    }
    if config.fused:
        linears["self_attn.qkv_proj"] = (queries + 2 * keys, width, config.qkv_bias)
        linears["mlp.gate_up_proj"] = (2 * inner, width, config.mlp_bias)
    else:
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            linears[f"self_attn.{name}_proj"] = (size, width, config.qkv_bias)
        for name in ("gate", "up"):
            linears[f"mlp.{name}_proj"] = (inner, width, config.mlp_bias)
    norms = dict.fromkeys(norm_names(config), width)
    if config.qk_norm != "none":
        whole = config.qk_norm == "width"
        norms["self_attn.q_norm"] = queries if whole else config.head_dim
        norms["self_attn.k_norm"] = keys if whole else config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, width), "norm.weight": (width,)}
    if config.labels:
        shapes["score.weight"] = (config.labels, width)
    elif not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for index in range(config.num_layers):
        for name, (outputs, inputs, bias) in linears.items():
            shapes[f"layers.{index}.{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"layers.{index}.{name}.bias"] = (outputs,)
        for name, size in norms.items():
            shapes[f"layers.{index}.{name}.weight"] = (size,)
    return shapes


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]], arithmetic: str) -> int:
    """Bytes of a loaded model's tensors of these shapes in one of MODES."""
    dtype, mode, head = MODES[arithmetic]
    total = 0
    for name, shape in shapes.items():
        if name == "lm_head.weight" and head != "plain":
            continue
        if mode != "plain" and _LAYER.match(name) and len(shape) == 2:
            total += weight_bytes(mode, shape[0], shape[1])
        else:
            total += dtype.itemsize * math.prod(shape)
    return total


def model_bytes(config: ModelConfig, arithmetic: str) -> int:
    """Bytes of a loaded decoder's tensors in one of MODES."""
    head = MODES[arithmetic].head
    kept = 0 if head == "plain" or config.labels else weight_bytes(head, config.vocab_size, config.width)
    return kept + tensor_bytes(expected_shapes(config), arithmetic)


def norm_names(config: ModelConfig) -> tuple[str, ...]:
    """A layer's norms in the order of use. Checkpoints call the norm before the feed-forward layer after its place
    (post_attention_layernorm) unless there is also one after attention."""
    return {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "both": (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
    }[config.norms]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Folding:
    """Factors that change a model's weights but not, in exact arithmetic, its answers. By names of layers and norms."""

    columns: dict[str, Tensor]  # inputs of a linear layer: its weight's columns are multiplied
    rows: dict[str, Tensor]  # outputs of a linear layer: its weight's rows and its bias are divided
    norms: dict[str, Tensor]  # a norm's weight is divided


class Weights:
    """Open files of a checkpoint whose tensors have all been checked; tensors are named without its prefix."""

    def __init__(self, arithmetic: Arithmetic, places: Mapping[str, _Place], norm_offset: float = 0.0) -> None:
        self.dtype, self.mode, self.head_mode = arithmetic
        self.folding = Folding({}, {}, {})
        self._offset = norm_offset
        self._places = places

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def take(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, in the model's dtype."""
        return self._read(name).to(self.dtype)

    def whole(self, name: str) -> Tensor:
        """Read one tensor as float32, whatever the model's dtype is."""
        return self._read(name).float()

    def layer_weight(self, name: str) -> Tensor:
        """Read the weight of a linear layer that is to be packed at once: in the model's dtype, or when it is going to
        be quantised as it is stored, so that it is rounded once; that may be the file's own memory."""
        weight = self._mapped(f"{name}.weight")
        if name in self.folding.columns:
            weight = weight.float() * self.folding.columns[name]
        if name in self.folding.rows:
            weight = weight.float() / self.folding.rows[name][:, None]
        return weight if self.mode != "plain" else weight.clone().to(self.dtype)

    def head(self, name: str) -> Tensor:
        """Read the weight of the head, which is to be packed at once: as a layer's."""
        weight = self._mapped(f"{name}.weight")
        return weight if self.head_mode != "plain" else weight.clone().to(self.dtype)

    def layer_bias(self, name: str) -> Tensor:
        """Read the bias of a linear layer, in the model's dtype."""
        bias = self._read(f"{name}.bias")
        return (bias / self.folding.rows[name] if name in self.folding.rows else bias).to(self.dtype)

    def norm(self, name: str) -> Tensor:
        """Read a norm's weight as float32, with the architecture's offset added."""
        weight = self._read(f"{name}.weight").float() + self._offset
        return weight / self.folding.norms[name] if name in self.folding.norms else weight

    def _read(self, name: str) -> Tensor:
        # A copy, so that nobody can change or cut the file under a running model.
        return self._mapped(name).clone()

    def _mapped(self, name: str) -> Tensor:
        place = self._places[name]
        return place.file.mapped(place.stored)


class _File:
    """A safetensors file, mapped anew now and then: what has been read of a mapping stays in this process's memory as
    long as the mapping does, and would count beside the copy that was made of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # bytes, through the present mapping
        self.open: Any = self._map()  # a type of the library that has no name for readers

    def _map(self) -> Any:
        return safe_open(self._path, framework="pt", device="cpu")

    def mapped(self, stored: str) -> Tensor:
        """A tensor as it lies in the file."""
        if self._read > _MAPPED_BYTES:
            self.open, self._read = self._map(), 0
        found = cast(Tensor, self.open.get_tensor(stored))
        self._read += found.nbytes
        return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies."""

    file: _File
    stored: str  # its name there


def load_weights(
    folder: str | Path, config: ModelConfig, dtype: torch.dtype = torch.float32, mode: Mode = "plain",
    head: Mode = "plain",
) -> Weights:  # fmt: skip
    """Open a checkpoint, check every name, shape and type from the files' headers, and return it for reading.

    `mode` is for the layers' linears. Nothing is converted or quantised before it is read.
    ModelError names the tensor that is missing, of another shape or type, or not part of the architecture.
    """
    shapes = expected_shapes(config)
    places = find_tensors(folder, shapes, lambda name: _may_be_left(name, config), config.architecture)
    return Weights(Arithmetic(dtype, mode, head), places, config.norm_offset)


def load_encoder_weights(
    folder: str | Path, config: EncoderConfig, dtype: torch.dtype = torch.float32, mode: Mode = "plain",
    head: Mode = "plain",
) -> Weights:  # fmt: skip
    """`load_weights` of an encoder, which has no head."""
    places = find_tensors(folder, encoder_shapes(config), may_be_left, config.architecture)
    return Weights(Arithmetic(dtype, mode, head), places)


def find_tensors(
    folder: str | Path, expected: Mapping[str, tuple[int, ...]], may_be_left: Callable[[str], bool], architecture: str
) -> dict[str, _Place]:
    """Where the expected tensors lie, all of them; others may be there only as `may_be_left` says."""
    places: dict[str, _Place] = {}
    for path in _find_files(Path(folder)):
        try:
            file = _File(path)
            names: list[str] = list(file.open.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: is not a whole safetensors file ({error}); copy it again") from error
        for stored in names:
            name = plain_name(stored)
            if name in expected:
                _check(path, stored, file.open.get_slice(stored), expected[name])
                places[name] = _Place(file, stored)
            elif not may_be_left(name):
                raise ModelError(
                    f"{path}: tensor {stored} is not part of a {architecture} model as config.json describes "
                    f"it, so its answers would be wrong; the folder may mix two checkpoints"
                )
    missing = [name for name in expected if name not in places]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder}: tensor {missing[0]} with shape {list(expected[missing[0]])} is missing{more}; "
            f"a {architecture} model as config.json describes it needs it"
        )
    return places


def _find_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in the order of their names: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: has no readable weight_map; copy it again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{index}: names {name!r}, which is not a file beside it")
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name}: is named by {index.name} and missing; copy it")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    others = [path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in sorted(folder.glob(kind))]
    found = f"{folder}: has no model.safetensors"
    raise ModelError(f"{found}, but {others[0]}: {_CONVERT}" if others else f"{found}: give the folder of a checkpoint")


def plain_name(stored: str) -> str:
    """A tensor's name without the prefix that its checkpoint gives to all of the decoder's."""
    for prefix in _PREFIXES:
        if stored.startswith(prefix):
            return stored[len(prefix) :]
    return stored


def _may_be_left(name: str, config: ModelConfig) -> bool:
    other_head = (config.tied or config.labels) and name == "lm_head.weight"
    return bool(other_head) or name.endswith("rotary_emb.inv_freq") or name.startswith(_FOREIGN)


def _check(path: Path, stored: str, header: Any, shape: tuple[int, ...]) -> None:
    found = tuple(header.get_shape())
    if found != shape:
        raise ModelError(f"{path}: tensor {stored} has shape {list(found)}; config.json calls for {list(shape)}")
    if header.get_dtype() not in _READABLE:
        raise ModelError(
            f"{path}: tensor {stored} is stored as {header.get_dtype()}; known are {', '.join(_READABLE)}: "
            f"use the unquantized checkpoint"
        )
