"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors, checked against a model.

It knows PEFT's names and settings, and must not know which rows use an adapter, nor how it is multiplied. What this
engine cannot compute is refused by name: an adapter applied in part would answer wrongly. Pickles are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.core.errors import ModelError
from shoal.nn.arch import ModelConfig
from shoal.nn.weights import expected_shapes, plain_name

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_RANK = 256
PANEL = 32  # a packed weight has whole panels of outputs

_READABLE = ("F32", "BF16", "F16")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_MERGE = "merge it into its base model with peft's merge_and_unload() and run that as a model of its own"
_KNOWN = frozenset(  # settings that are read below, or that change nothing once an adapter is trained
    "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform"
    " layers_pattern bias init_lora_weights peft_type auto_mapping base_model_name_or_path revision task_type"
    " inference_mode lora_dropout peft_version loftq_config eva_config corda_config lora_ga_config runtime_config"
    " megatron_core qalora_group_size ensure_weight_tying".split()
)
_REASONS = {
    "use_dora": "DoRA scales the whole weight",
    "modules_to_save": "it replaces whole layers of the base model",
    "trainable_token_indices": "it changes embeddings",
    "lora_bias": "its second products have biases",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it changes parameters that are no linear layers",
    "alora_invocation_tokens": "it is switched on by tokens of the prompt",
    "fan_in_fan_out": "its base layers are stored transposed",
}
_KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base model as it was


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one linear layer's weight: up · down * scale, in the model's dtype."""

    down_RK: Tensor
    up_NR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Module:
    """Where a layer's two tensors lie in the file, and how they are scaled."""

    names: tuple[str, str]  # A and B
    rank: int
    scale: float


class Adapter:
    """An open adapter all of whose settings, names and shapes have been checked. Tensors are read when asked for."""

    def __init__(self, path: Path, dtype: torch.dtype, modules: Mapping[str, _Module], num_bytes: int) -> None:
        self.num_bytes = num_bytes  # in memory, once packed
        self._path, self._dtype, self._modules = path, dtype, modules
        self._file: Any = safe_open(path, framework="pt", device="cpu")

    def take(self, module: str) -> LowRank | None:
        """What it adds to a linear layer, named as its weight is without the checkpoint's prefix; None: nothing.

        ModelError for numbers that are not finite.
        """
        if module not in self._modules:
            return None
        found = self._modules[module]
        down, up = (cast(Tensor, self._file.get_tensor(name)).to(self._dtype).clone() for name in found.names)
        for name, tensor in zip(found.names, (down, up), strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self._path}: tensor {name} has numbers that are not finite: train or copy it again")
        return LowRank(down, up, found.scale)


def load_adapter(folder: str | Path, config: ModelConfig, dtype: torch.dtype) -> Adapter:
    """Open an adapter for a model whose activations have that dtype.

    ModelError says which setting, tensor or shape does not fit, and what to do.
    """
    path = Path(folder)
    settings = _read_settings(path)
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_shapes(config).items()
        if name.startswith("layers.") and len(shape) == 2
    }
    pairs, headers = _read_names(path, settings, shapes)
    targets = _Targets(settings, path)
    modules: dict[str, _Module] = {}
    total = 0
    prefix = ""
    for name, sides in pairs.items():
        prefix = sides["path"].removesuffix(name)
        if not targets.hold(sides["path"]):
            raise ModelError(
                f"{path / TENSORS}: holds {sides['path']}, which the target_modules of {CONFIG} do not name: "
                "the folder may mix two adapters; copy it again"
            )
        rank = _check_shapes(path, sides, headers, shapes[name], settings)
        modules[name] = _Module((sides["A"], sides["B"]), rank, targets.scale(sides["path"], rank))
        outputs, inputs = shapes[name]
        total += ((rank + -rank % PANEL) * inputs + (outputs + -outputs % PANEL) * rank) * dtype.itemsize
    for name in shapes:
        if name not in modules and targets.hold(prefix + name):
            raise ModelError(
                f"{path / TENSORS}: has nothing for {prefix + name}, which the target_modules of {CONFIG} name: "
                "the file is cut, or the adapter was made for another base model "
                f"({settings.get('base_model_name_or_path')!r}); give the model it was trained on"
            )
    return Adapter(path / TENSORS, dtype, modules, total)


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, all of whose settings are ones that this engine honours."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}): give a folder that peft's save_pretrained() wrote"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}): copy it again") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind!r}: only LORA adapters are supported; {_MERGE} if it can be")
    for name, value in settings.items():
        if name not in _KNOWN and value:
            reason = f" ({_REASONS[name]})" if name in _REASONS else ""
            raise ModelError(f"{path}: {name} is {value!r}, which is not supported{reason}: {_MERGE}")
    if settings.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias is {settings['bias']!r}: trained biases are not supported: {_MERGE}")
    start = settings.get("init_lora_weights", True)
    if start not in _KEPT_BASE:
        raise ModelError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model's weights: save the adapter with "
            f"path_initial_model_for_weight_conversion, or {_MERGE}"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), (int, float)) or isinstance(settings[name], bool) or settings[name] <= 0:
            raise ModelError(f"{path}: {name} must be a number above 0, found {settings.get(name)!r}")
    return cast(dict[str, Any], settings)


def _read_names(
    folder: Path, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Each adapted layer's tensors by side, with the layer's path as the file has it, and all tensors' headers."""
    path = folder / TENSORS
    if not path.is_file() and (folder / PICKLE).is_file():
        raise ModelError(
            f"{folder}: has {PICKLE} and no {TENSORS}: pickles can run code and are never opened; load the adapter "
            "with peft where you trust it and save it again with save_pretrained(OUT, safe_serialization=True)"
        )
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is not a whole safetensors file ({error}); copy it again") from error
    pairs: dict[str, dict[str, str]] = {}
    for stored in headers:
        match = _TENSOR.fullmatch(stored)
        module = plain_name(match["module"]) if match else ""
        if match is None or module not in shapes:
            raise ModelError(_stranger(path, stored, match["module"] if match else "", settings))
        sides = pairs.setdefault(module, {"path": match["module"]})
        if match["side"] in sides or sides["path"] != match["module"]:
            raise ModelError(f"{path}: holds two tensors for lora_{match['side']} of {module}; copy it again")
        sides[match["side"]] = stored
    if not pairs:
        raise ModelError(f"{path}: holds no tensors, so the adapter would change nothing; copy it again")
    for sides in pairs.values():
        lacking = {"A", "B"} - sides.keys()
        if lacking:
            raise ModelError(f"{path}: lora_{lacking.pop()} of {sides['path']} is missing; copy the file again")
    return pairs, headers


def _stranger(path: Path, stored: str, module: str, settings: Mapping[str, Any]) -> str:
    if "lora_magnitude_vector" in stored:
        return f"{path}: tensor {stored} is DoRA's, which is not supported: {_MERGE}"
    if ".lora_" not in stored or "lora_embedding" in stored or "bias" in stored or module == "lm_head":
        return (
            f"{path}: tensor {stored} is more than a low-rank change of the linear layers inside decoder layers, and "
            f"is not supported: train the adapter without it, or {_MERGE}"
        )
    return (
        f"{path}: tensor {stored} belongs to no linear layer of this model; the adapter was made for "
        f"{settings.get('base_model_name_or_path')!r}: give the model it was trained on"
    )


def _check_shapes(
    folder: Path, sides: Mapping[str, str], headers: Mapping[str, Any], shape: Sequence[int],
    settings: Mapping[str, Any],
) -> int:  # fmt: skip
    """The rank of a layer's tensors, which fit the layer and each other and are as the settings say."""
    path, (outputs, inputs) = folder / TENSORS, shape
    rank = _pattern(settings, "rank_pattern", sides["path"], settings["r"], folder)
    if rank != int(rank) or not 1 <= rank <= MOST_RANK:
        raise ModelError(f"{folder / CONFIG}: rank {rank} of {sides['path']} is not from 1 to {MOST_RANK}: {_MERGE}")
    for side, wanted in (("A", [int(rank), inputs]), ("B", [outputs, int(rank)])):
        header = headers[sides[side]]
        if list(header.get_shape()) != wanted:
            raise ModelError(
                f"{path}: tensor {sides[side]} has shape {list(header.get_shape())}; {CONFIG} and the model call for "
                f"{wanted}: the adapter was made for {settings.get('base_model_name_or_path')!r}; give the model it "
                "was trained on"
            )
        if header.get_dtype() not in _READABLE:
            raise ModelError(
                f"{path}: tensor {sides[side]} is stored as {header.get_dtype()}; known are {', '.join(_READABLE)}: "
                "save it again in one of these"
            )
    return int(rank)


def _pattern(settings: Mapping[str, Any], name: str, module: str, default: float, folder: Path) -> float:
    """A number that some modules have for themselves: the first pattern that fits the end of a module's path."""
    patterns = settings.get(name) or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise ModelError(f"{folder / CONFIG}: {name} of {pattern} must be a number above 0, found {value!r}")
            return value
    return default


class _Targets:
    """Which layers an adapter's settings name, and how each is scaled."""

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        self._settings, self._folder = settings, folder
        given = settings.get("layers_to_transform")
        self._layers = {given} if isinstance(given, int) else set(given or ())

    def hold(self, module: str) -> bool:
        """Whether the settings name the module, as PEFT decides it."""
        settings = self._settings
        if _named(settings.get("exclude_modules"), module):
            return False
        targets = settings.get("target_modules")
        if isinstance(targets, str):
            return targets == "all-linear" or _named(targets, module)
        if not _named(targets, module):
            return False
        index = re.search(r"\.(\d+)\.", f".{module}")
        return not self._layers or module in targets or (index is not None and int(index[1]) in self._layers)

    def scale(self, module: str, rank: int) -> float:
        """alpha over the rank, or over its root."""
        alpha = _pattern(self._settings, "alpha_pattern", module, self._settings["lora_alpha"], self._folder)
        return alpha / math.sqrt(rank) if self._settings.get("use_rslora") else alpha / rank


def _named(names: str | Sequence[str] | None, module: str) -> bool:
    """Whether a regular expression fits a module's whole path, or one of a list of names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())
