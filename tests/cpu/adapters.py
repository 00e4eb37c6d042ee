"""Random LoRA adapters in the layout that PEFT saves, written by hand, and models with them merged into their weights.

It knows the files' format. It must not know how Shoal reads or computes them.
"""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def save_adapter(
    model: Any, folder: Path, targets: tuple[str, ...] = EVERY, rank: int = 8, alpha: float = 16.0, seed: int = 1,
    strength: float = 1.0, **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Write an adapter for all of the model's layers of those names; returns its tensors.

    What it adds is about as large as the weight, so that it changes what is answered.
    """
    generator = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.1, "bias": "none", "target_modules": list(targets),
        "modules_to_save": None, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
        "inference_mode": True, "fan_in_fan_out": False, "init_lora_weights": True, "layers_to_transform": None,
        **settings,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in targets:
            outputs, inputs = module.weight.shape
            own = int(_own(config["rank_pattern"], path, rank))
            by = strength / (scale_of(config, path) * math.sqrt(own))
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(own, inputs, generator=generator) / math.sqrt(inputs)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, own, generator=generator) * by
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def scale_of(config: dict[str, Any], path: str) -> float:
    """alpha over the rank, or over its root."""
    rank = _own(config["rank_pattern"], path, config["r"])
    alpha = _own(config["alpha_pattern"], path, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _own(patterns: dict[str, float], path: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


@torch.no_grad()
def merged(model: Any, folder: Path, tensors: dict[str, Tensor]) -> Any:
    """The model with W + scale * B · A in place of W."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        down = tensors.get(f"base_model.model.{path}.lora_A.weight")
        if down is not None:
            up = tensors[f"base_model.model.{path}.lora_B.weight"]
            module.weight += (scale_of(config, path) * (up.double() @ down.double())).float()
    return model
