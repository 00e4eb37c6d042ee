"""Rotary position embeddings: frequencies from a checkpoint's parameters, and the tables of their angles.

It knows every scaling rule of the supported checkpoints, and must not know layers or tensors of a step.
Rules that depend on length are settled here, once, from the configured context: a prefix has one set of keys.
The arithmetic follows the float32 order of the published formulas, so that angles agree to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class Rope:
    """Angle per position of each rotated pair, and what cosine and sine are multiplied by."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def make_rope(parameters: Mapping[str, object], head_dim: int, trained: int, context: int) -> Rope:
    """Settle the frequencies for one kind of layer.

    `parameters` is a checkpoint's rope_parameters (rope_scaling merged with rope_theta), `trained` its
    max_position_embeddings. ModelError for an unknown kind or a missing number.
    """
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    width = int(head_dim * _number(parameters, "partial_rotary_factor", 1.0))
    theta = _number(parameters, "rope_theta")
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    if kind == "default":
        return _rope(1.0 / theta**exponents)
    if kind == "linear":
        return _rope(1.0 / theta**exponents / _number(parameters, "factor"))
    if kind == "dynamic":
        factor = _number(parameters, "factor")
        stretch = factor * max(context, trained) / trained - (factor - 1)
        return _rope(1.0 / (theta * stretch ** (width / (width - 2))) ** exponents)
    if kind == "llama3":
        return _rope(_llama3(parameters, 1.0 / theta**exponents, trained))
    if kind == "yarn":
        return _yarn(parameters, theta, exponents, width, trained)
    if kind in ("longrope", "su"):
        return _longrope(parameters, theta, exponents, trained, context)
    raise ModelError(
        f"rope scaling {kind!r} is not supported: known are default, linear, dynamic, llama3, yarn, longrope"
    )


def make_table(rope: Rope, context: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position below `context` as float32 [context, F]."""
    angles = torch.arange(context, dtype=torch.float32)[:, None] * torch.tensor(rope.frequencies)
    return angles.cos() * rope.scale, angles.sin() * rope.scale


def _rope(frequencies: Tensor, scale: float = 1.0) -> Rope:
    return Rope(tuple(frequencies.tolist()), scale)


def _llama3(parameters: Mapping[str, object], frequencies: Tensor, trained: int) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between mixed."""
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    original = _number(parameters, "original_max_position_embeddings", trained)
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    mix = (original / wavelengths - low) / (high - low)
    mixed = (1 - mix) * stretched / factor + mix * stretched
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, mixed, stretched)


def _yarn(parameters: Mapping[str, object], theta: float, exponents: Tensor, width: int, trained: int) -> Rope:
    original = _number(parameters, "original_max_position_embeddings", trained)
    factor = _number(parameters, "factor", trained / original)

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_number(parameters, "beta_fast", 32))
    high = dimension(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = theta**exponents
    keep = 1 - ramp
    frequencies = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return _rope(frequencies, _yarn_scale(parameters, factor))


def _yarn_scale(parameters: Mapping[str, object], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return _number(parameters, "attention_factor")

    def grow(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = _number(parameters, "mscale", 0.0), _number(parameters, "mscale_all_dim", 0.0)
    return grow(numerator) / grow(denominator) if numerator and denominator else grow(1.0)


def _longrope(parameters: Mapping[str, object], theta: float, exponents: Tensor, trained: int, context: int) -> Rope:
    original = _number(parameters, "original_max_position_embeddings", trained)
    name = "long_factor" if context > original else "short_factor"
    factors = parameters.get(name)
    if not isinstance(factors, list) or len(factors) != len(exponents):
        raise ModelError(f"config.json: rope {name} must be a list of {len(exponents)} numbers")
    factor = _number(parameters, "factor", trained / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = _number(parameters, "attention_factor", usual)
    return _rope(1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**exponents), scale)


def _number(parameters: Mapping[str, object], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelError(f"config.json: rope parameter {name} must be a number, found {value!r}")
    return value
