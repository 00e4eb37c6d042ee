"""Machines as data: what their makers promise, what they were measured to reach, and the wires between them.

It knows numbers and where each is from; it must not know models, steps or how a time is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Wire:
    """How one device's messages reach another. A message goes the quicker of two ways, as libraries choose by size:
    one begins soon, the other carries much."""

    bandwidth: float  # bytes/s in one direction, promised
    share: float = 1.0  # of it that a large message reaches
    latency: float = 10e-6  # s before a large message moves, and between the rounds of a collective
    soon: float = 10e-6  # s, of the way that begins soon
    soon_share: float = 1.0  # of the bandwidth, on that way


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What part of a promise is kept. The defaults keep all of it: a bare roofline."""

    compute: float = 1.0  # share of the peak that a large matrix product reaches
    memory: float = 1.0  # share of the bandwidth at which weights are read
    hidden: float = 1.0  # of computing and reading, the part of the shorter that passes behind the longer
    light: float = 1.0  # share of the bandwidth of what is done to each number once: norms, activation, sums
    attention: float = 1.0  # share of the peak of query-key pairs
    reading: float = 1.0  # share of the bandwidth at which keys and values are read
    kernel: float = 0.0  # s that each of a layer's kernels takes beside
    layer: float = 0.0  # s of each layer
    step: float = 0.0  # s of each step
    row: float = 0.0  # s of each row that gets a token


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, and the wires to others. Rates are of dense products with sums of 32 bits."""

    name: str
    peak: Mapping[str, float]  # operations/s by kind of number; a product and a sum are two
    bandwidth: float  # bytes/s of its memory
    memory: int  # bytes
    near: Wire  # to the devices beside it
    far: Wire  # to other machines
    units: int = 1  # that work at tiles of a product at once
    tile: int = 1  # tokens by which a large product's work grows
    efficiency: Efficiency = Efficiency()
    usable: float = 0.9  # of the memory, for weights and keys and values
    devices: int = 8  # of one machine


_IB = Wire(25e9)  # 200 Gbit/s InfiniBand to each device, as in the makers' own 8-device machines
_BARE: Mapping[str, Hardware] = {
    # NVIDIA A100 80GB datasheet (SXM, June 2021): 312 and 624 T dense, 2,039 GB/s, NVLink 600 GB/s both ways together;
    # 108 units (Ampere whitepaper).
    "a100": Hardware("a100", {"fp32": 19.5e12, "bf16": 312e12, "int8": 624e12}, 2.039e12, 80 << 30, Wire(300e9), _IB, 108, 128),
}
