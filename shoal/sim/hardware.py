"""Machines as data: what their makers promise, what they were measured to reach, and the wires between them.

It knows numbers and where each is from; it must not know models, steps or how a time is made of them. What is called
fitted is found again, with its error on what it was not fitted to, by `benchmarks/prove_calibration.py` from the
measured profiles of ../shared/data/traces/gpu_profiles; all else is from public data sheets, as named beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Wire:
    """How one device's messages reach another: small ones begin soon, large ones have another way, as libraries choose
    by size. Between machines that way may also be the slower one, when buffers are full."""

    bandwidth: float  # bytes/s in one direction, promised
    share: float = 1.0  # of it that a large message reaches
    latency: float = 10e-6  # s before a large message moves
    soon: float = 10e-6  # s before a small message moves
    soon_share: float = 1.0  # of the bandwidth that a small one reaches
    small: float = 0.0  # bytes that move, at most, of a small message


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What part of a promise is kept. The defaults keep all of it: a bare roofline."""

    compute: float = 1.0  # share of the peak that a matrix product reaches
    memory: float = 1.0  # share of the bandwidth at which weights are read
    hidden: float = 1.0  # of computing and reading, the part of the shorter that passes behind the longer
    light: float = 1.0  # share of the bandwidth of what is done to each number once: norms, activations, sums
    attention: float = 1.0  # share of the peak of query-key pairs
    reading: float = 1.0  # share of the bandwidth at which keys and values are read
    kernel: float = 0.0  # s that each of a layer's kernels takes beside
    layer: float = 0.0  # s in which the host hands a layer to the device: seen only where the device is quicker
    step: float = 0.0  # s between two steps in which the device does nothing
    row: float = 0.0  # s of each row that gets a token


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, and the wires to others. Rates are of dense products."""

    name: str
    peak: Mapping[str, float]  # operations/s by kind of number; a product and a sum are two
    bandwidth: float  # bytes/s of its memory
    memory: int  # bytes
    near: Wire  # to the devices beside it
    far: Wire  # to another machine, from one device to one
    joint: Wire  # of sums over the devices of several machines: each has wires of its own, and others' work beside it
    tile: int = 1  # tokens by which the work of a large product grows
    devices: int = 8  # of one machine
    usable: float = 0.93  # of the memory, for weights, keys and values; fitted to DistServe's table of tokens on A100
    efficiency: Efficiency = Efficiency()

    def bare(self) -> Hardware:
        """The same as its maker promises it: the control of every calibration."""
        near, far, joint = (Wire(wire.bandwidth) for wire in (self.near, self.far, self.joint))
        return replace(self, near=near, far=far, joint=joint, tile=1, efficiency=Efficiency())


# Fitted: products and light kernels on the A100 to Vidur's Llama-2-7B, on the H100 to Vidur's Llama-2-7B. What a
# serving engine adds (attention, reading, layer, step, row) to DistServe's engine with OPT-13B on the A100; nobody
# measured that on an H100 for us, so it has the A100's shares.
A100_KEPT = Efficiency(0.72, 0.78, 1.0, 0.62, 0.40, 0.62, 4.3e-6, 2.1e-4, 1.8e-3, 1.6e-5)
H100_KEPT = replace(A100_KEPT, compute=0.80, memory=0.96, hidden=0.52, light=0.52, kernel=3.5e-6)

# Fitted: all-reduces among 2, 4 and 8 devices of one machine, by two rounds of a ring.
_NVLINK_A100 = Wire(300e9, 0.58, 48e-6, 40e-6, 1.0, 1.3e6)
_NVLINK_H100 = Wire(450e9, 0.78, 27e-6, 30e-6, 0.2, 1.2e6)
# Between machines, 200 Gbit/s a device promised. Fitted: sums over 16 devices in two machines, which are what tensor
# parallelism over machines does (fewer devices of each use other wires); and sends from one device to one, which were
# measured between machines of another kind and are much slower: 8 GB/s up to 5 MB, 2.3 above.
_JOINT = Wire(25e9, 0.79, 690e-6, 65e-6, 0.16, 2.4e6)
_FAR = Wire(25e9, 0.093, 0.0, 9.4e-6, 0.32, 4.75e6)
_PCIE_4 = Wire(32e9, 0.58, 48e-6, 40e-6, 1.0, 1.3e6)  # 16 lanes; the A100's shares, for want of a measurement

A100 = Hardware(
    # NVIDIA A100 80GB SXM data sheet (2021): 312 and 624 T, 2,039 GB/s, NVLink 600 GB/s, both ways together.
    "a100", {"bf16": 312e12, "int8": 624e12, "fp32": 19.5e12}, 2.039e12, 80 << 30, _NVLINK_A100, _FAR, _JOINT, 128,
    efficiency=A100_KEPT,
)  # fmt: skip
H100 = Hardware(
    # NVIDIA H100 SXM data sheet (2023), without sparsity: 989 T, twice that with 8 bits, 3.35 TB/s, NVLink 900 GB/s.
    # Between machines 400 Gbit/s, with the A100's shares.
    "h100", {"bf16": 989.4e12, "int8": 1979e12, "fp8": 1979e12, "fp32": 67e12}, 3.35e12, 80 << 30, _NVLINK_H100,
    replace(_FAR, bandwidth=50e9), replace(_JOINT, bandwidth=50e9), 128, efficiency=H100_KEPT,
)  # fmt: skip
# NVIDIA H200 SXM data sheet (2024): an H100 with 141 GB at 4.8 TB/s. Its shares are the H100's, not measured.
H200 = replace(H100, name="h200", bandwidth=4.8e12, memory=141_000_000_000)
A40 = Hardware(
    # NVIDIA A40 data sheet (2021): 149.7 and 299.3 T, 696 GB/s, 48 GB, NVLink 112.5 GB/s between two, PCIe 4.0
    # between others, which is what four or eight of them have. Its shares are the A100's, not measured.
    "a40", {"bf16": 149.7e12, "int8": 299.3e12, "fp32": 37.4e12}, 0.696e12, 48 << 30, _PCIE_4, _FAR, _JOINT, 128,
    efficiency=A100_KEPT,
)  # fmt: skip
# NVIDIA RTX A6000 data sheet (2021): 154.8 T (309.7 with sparsity), 768 GB/s, 48 GB. Shares are the A100's.
A6000 = replace(
    A40, name="a6000", peak={"bf16": 154.8e12, "int8": 309.7e12, "fp32": 38.7e12}, bandwidth=0.768e12, memory=48 << 30
)
CPU = Hardware(
    # Two cores of an AMD EPYC with AVX-512, as `shoal bench` measures them: the medians of the limits in
    # benchmarks/results/floor.json. No wires: there is one.
    "cpu", {"bf16": 0.91e12, "int8": 1.82e12, "fp32": 0.46e12}, 40e9, 24 << 30, Wire(40e9), Wire(1.25e9),
    Wire(1.25e9), 16, 1,
)  # fmt: skip

HARDWARE: Mapping[str, Hardware] = {each.name: each for each in (A100, H100, H200, A40, A6000, CPU)}

# Whole engines of 2023 as others measured them, for comparisons with what was published then. Fitted: vLLM as DistServe
# measured it (OPT-13B, A100), and the engine of Splitwise (Llama-2-70B on two and eight devices; Efficiency by device).
ENGINES: Mapping[str, Efficiency] = {
    "distserve a100": A100_KEPT,
    "vllm-2023 a100": Efficiency(0.54, 0.67, 1.0, 0.62, 0.14, 0.75, 4.3e-6, 5.7e-4, 3.1e-3, 7.5e-5),
    "splitwise a100": replace(A100_KEPT, compute=0.62, memory=0.78, layer=4.9e-4, step=5.7e-3, row=2.6e-4),
    "splitwise h100": replace(H100_KEPT, compute=0.56, memory=0.83, layer=3.2e-4, step=4.5e-3, row=2.6e-4),
}
