"""What a quantised weight is, and the product with it that every backend must give: the specification, in plain torch;
also what quantised keys and values are.

It knows numbers, groups and rounding, and must not know how any backend lays them out, nor what a model is.

A quantised weight is whole numbers with scales, and activations are quantised row by row just before the product; sums
of products of whole numbers are exact, so that only the few floating-point operations after them could differ between
backends, and those are stated here in their order. Letters: T rows, N outputs, K inputs, C groups of inputs,
G key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.api import Mode
from shoal.kernels.ref_product import fill_weight, tiled_product

EIGHT_BITS = ("int8", "int8-a16")  # modes whose weights are int8
LEVELS = 127  # int8 numbers are -127 to 127: symmetric, so that a sign costs nothing
WIDEST = 512  # numbers of a head: sums of their products with numbers of 16 bits fit in 32
WIDE_LEVELS = 127 * 256  # activations of 16 bits: a byte times 256 and a byte more, so that both are int8
NIBBLE = 15  # int4 numbers are 0 to 15, less a zero point
CHUNK = 32000  # numbers rounded at a time: they stay in the cache, and are too few for torch to share among threads
TINY = 1e-30  # rows and outputs whose largest number is below this count as zero: their inverse might be infinite


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of N outputs and K inputs: (values - zero) * scale, each scale being one of an output's groups."""

    mode: Mode
    values_NK: Tensor  # int8 -127 to 127, or uint8 0 to 15
    scale_NC: Tensor  # float32 with one group for int8, else bf16
    zero_NC: Tensor | None  # uint8 0 to 15; none for int8 numbers
    group: int  # inputs that share a scale; the last group may be shorter

    def plain(self) -> Tensor:
        """The weight that these numbers mean, as float32 [N, K]."""
        values = self.values_NK.float()
        if self.zero_NC is None:
            return values * self.scale_NC
        spread = [each.float().repeat_interleave(self.group, dim=1) for each in (self.zero_NC, self.scale_NC)]
        zero, scale = (each[:, : values.shape[1]] for each in spread)
        return (values - zero) * scale


def group_size(mode: Mode, inputs: int) -> int:
    """Inputs that share a scale. Narrow layers have small groups, so that their scales still fit what they scale."""
    if mode in EIGHT_BITS:
        return inputs
    return 128 if inputs >= 1024 else 64


def weight_bytes(mode: Mode, outputs: int, inputs: int) -> int:
    """Bytes of a quantised weight with its scales and zeros."""
    if mode in EIGHT_BITS:
        return outputs * (inputs + 8)
    return outputs * (-(-inputs // 2) + 3 * -(-inputs // group_size(mode, inputs)))


def quantize(weight_NK: Tensor, mode: Mode) -> Quantized:
    """Round a weight of any floating-point type to the nearest numbers of a mode, ties to even.

    int8 and int8-a16: an output's largest magnitude becomes 127. int4: the range of a group, widened to hold zero,
    becomes 0 to 15; the scale is rounded to bf16 before it is used. ValueError for a weight with numbers that are not
    finite.
    """
    if mode == "plain":
        raise ValueError("a plain weight is not quantised")
    group, eight = group_size(mode, weight_NK.shape[1]), mode in EIGHT_BITS
    parts = [_round_int8(part) if eight else _round_int4(part, group) for part in pieces(weight_NK)]
    values, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return Quantized(mode, values, scales, None if eight else zeros, group)


def pieces(weight_NK: Tensor) -> tuple[Tensor, ...]:
    """The weight in runs of rows that stay in the cache."""
    return weight_NK.split(max(1, CHUNK // weight_NK.shape[1]))


def _round_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight_NK.float()
    peak_N1 = weight.abs().amax(dim=1, keepdim=True)
    _check_finite(peak_N1)
    scale = _no_zeros(_over(peak_N1, LEVELS))
    values = (weight / scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return values, scale, scale


def _round_int4(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    # Filled up with zeros, which every group's range holds anyway.
    inputs = weight_NK.shape[1]
    filled = torch.nn.functional.pad(weight_NK.float(), (0, -inputs % group)).unflatten(1, (-1, group))
    low_NC1, high_NC1 = filled.amin(dim=2, keepdim=True).clamp_(max=0), filled.amax(dim=2, keepdim=True).clamp_(min=0)
    _check_finite(high_NC1 - low_NC1)
    scale = _no_zeros(_over(high_NC1 - low_NC1, NIBBLE)).bfloat16()
    step = scale.float()
    zero = (-low_NC1 / step).round_().clamp_(0, NIBBLE)
    values = (filled / step).round_().add_(zero).clamp_(0, NIBBLE).to(torch.int8).view(torch.uint8)
    return values.flatten(1)[:, :inputs], scale[..., 0], zero[..., 0].to(torch.uint8)


def _check_finite(peak: Tensor) -> None:
    if not bool(torch.isfinite(peak).all()):
        raise ValueError("the weight has numbers that are not finite")


def _over(x: Tensor, number: int) -> Tensor:
    """x / number, rounded once: where one side is a plain number, torch may multiply by an inverse instead."""
    return x / torch.full_like(x, number)


def _no_zeros(scale: Tensor) -> Tensor:
    return torch.where(scale < TINY, 1.0, scale)


def quantize_rows(x_TK: Tensor, group: int, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers -127 to 127 (float32 [T, C, group], filled up with zeros) and scales [T, C].

    The largest magnitude of each group of a row becomes 127: numbers are multiplied by 127 / peak and rounded, ties to
    even; the scale is peak / 127; or so with another number of levels. A group that holds a NaN or an infinity has a
    scale that is none, so that its row's results are none.
    """
    x = x_TK.float()
    grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    peak_TC1 = grouped.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(peak_TC1 < TINY, 0.0, torch.full_like(peak_TC1, levels) / peak_TC1)
    numbers = (grouped * inverse).round_().nan_to_num_(0.0)
    scale_TC1 = torch.where(torch.isfinite(peak_TC1), _over(peak_TC1, levels), torch.nan)
    return numbers, scale_TC1[..., 0]


def mixed(x: Tensor) -> Tensor:
    """Sums and differences of neighbours, then of those in the same way, over runs of the width's largest power of two.

    This Walsh-Hadamard transform multiplies products of two heads by `run_of` of their width and leaves them as they
    are otherwise. Keys of some models have a few numbers that are far larger than the others; mixed, they are many of
    moderate size, and rounding to a share of the largest costs less. The result is float32.
    """
    x, half = x.float(), 1
    while half < run_of(x.shape[-1]):
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return x


def run_of(width: int) -> int:
    """How many neighbours are mixed together."""
    return width & -width


def quantize_heads(key_TGE: Tensor, value_TGE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values as int8 [T, G, E], each with its scales [T, G]: keys, their scales, values, theirs.

    Rounded as activations are, keys after they are `mixed`, each head of a token with a scale of its own, so that what
    is stored depends on nothing but the token. Queries must be mixed too. Where a key or a value is not finite the
    key's scale is none, so that whoever sees the position gets what is none; such a value counts as zeros, so that
    nobody else does.
    """
    (key, key_scale), (value, value_scale) = _round_heads(mixed(key_TGE)), _round_heads(value_TGE)
    return key, key_scale + 0 * value_scale, value, value_scale.nan_to_num(0.0)


def _round_heads(x_TGE: Tensor) -> tuple[Tensor, Tensor]:
    numbers, scale = quantize_rows(x_TGE.flatten(0, 1), x_TGE.shape[2])
    return numbers.to(torch.int8).view(x_TGE.shape), scale.view(x_TGE.shape[:2])


def product(x_TK: Tensor, weight: Quantized) -> Tensor:
    """x · weightᵀ as float32 [T, N].

    int8: float(sum) * (row's scale * output's scale). int8-a16: rows are rounded to
    16 bits, 256 times a high byte and a low one more, -128 to 127;
    (float(sum of high) * 256 + float(sum of low)) * (row's scale * output's scale). int4: over the groups from left to
    right, from 0,
    total = float(sum - zero * sum of the row's numbers) * (output's scale * row's scale) + total, rounded once.
    int4-a16: activations stay as they are; the same with sums of float64 and a row's scale of 1.
    """
    if weight.mode == "int8":
        numbers, scale_T1 = quantize_rows(x_TK, weight.group)
        sums = numbers.flatten(1).double() @ weight.values_NK.double().t()
        return sums.float() * (scale_T1 * weight.scale_NC.t())
    if weight.mode == "int8-a16":
        numbers, scale_T1 = quantize_rows(x_TK, weight.group, WIDE_LEVELS)
        high = torch.floor((numbers.flatten(1) + 128) / 256)
        low = numbers.flatten(1) - 256 * high
        high_sums, low_sums = ((part.double() @ weight.values_NK.double().t()).float() for part in (high, low))
        return (high_sums * 256 + low_sums) * (scale_T1 * weight.scale_NC.t())
    assert weight.zero_NC is not None
    if weight.mode == "int4":
        numbers, scale_TC = quantize_rows(x_TK, weight.group)
    else:
        numbers = torch.nn.functional.pad(x_TK, (0, -x_TK.shape[1] % weight.group)).unflatten(1, (-1, weight.group))
        scale_TC = torch.ones(numbers.shape[:2], device=x_TK.device)
    total = torch.zeros(len(x_TK), len(weight.values_NK), device=x_TK.device)
    values = torch.nn.functional.pad(weight.values_NK, (0, -weight.values_NK.shape[1] % weight.group))
    for c, part_NK in enumerate(values.split(weight.group, dim=1)):
        # What fills up the last group is zero in the row, and so counts for nothing.
        centred = part_NK.double() - weight.zero_NC[:, c, None].double()
        sums = tiled_product(numbers[:, c].double(), fill_weight(centred))[:, : len(centred)].float()
        scales = weight.scale_NC[:, c].float() * scale_TC[:, c, None]
        total = (sums.double() * scales.double() + total.double()).float()
    return total
