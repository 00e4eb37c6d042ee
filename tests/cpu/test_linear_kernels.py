"""The compiled linear layers against float64, for every kind of weight and every instruction set this machine has.

Must not know the Python layer that engines use: weights are packed and called through the extension itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import _cpu, set_threads

SETS = _cpu.names()
KINDS = ["fp32", "bf16", "int8", "int8_a16", "int4", "int4_a16"]
GATES = {"none": _cpu.Gate.NONE, "silu": _cpu.Gate.SILU, "gelu": _cpu.Gate.GELU}
EPS = 2.0**-24  # half a step of float
GUARD = 64  # numbers around y that no kernel may touch
every_set = pytest.mark.parametrize("name", SETS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def up(n: int, unit: int) -> int:
    return -(-n // unit)


@dataclass
class Layer:
    """A packed weight, and what it should compute: `dense` [n, k] in float64 is what its numbers mean."""

    kind: str
    gate: str
    outputs: int
    k: int
    group: int
    dense: torch.Tensor
    bias: torch.Tensor | None
    tensors: list[torch.Tensor]  # panels, scale, zero: kept alive
    call: _cpu.Linear
    wide: bool

    @property
    def input_type(self) -> torch.dtype:
        return torch.float32 if self.kind == "fp32" else torch.bfloat16

    @property
    def output_type(self) -> torch.dtype:
        return torch.float32 if self.wide else self.input_type

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, factor: float = 1.0, threads: int = 1
    ) -> torch.Tensor:
        assert x.dtype == self.input_type and x.is_contiguous()
        rows = len(x)
        memory = torch.full((rows * self.outputs + 2 * GUARD,), 77.0, dtype=self.output_type)
        y = memory[GUARD : GUARD + rows * self.outputs]
        before = torch.get_num_threads()
        set_threads(threads)
        try:
            self.call(x.data_ptr(), rows, 0 if residual is None else residual.data_ptr(), factor, y.data_ptr())
        finally:
            set_threads(before)
        assert bool((memory[:GUARD] == 77).all()) and bool((memory[len(memory) - GUARD :] == 77).all())
        return y.view(rows, self.outputs)


def in_panels(values_GN: torch.Tensor) -> torch.Tensor:
    """[groups, panels * 32] as [panels, groups, 32]."""
    groups, n = values_GN.shape
    return values_GN.view(groups, n // 32, 32).transpose(0, 1).contiguous()


def make(
    name: str, kind: str, outputs: int, k: int, gate: str = "none", group: int = 64, bias: bool = False,
    wide: bool = False, seed: int = 0,
) -> Layer:  # fmt: skip
    generator = torch.Generator().manual_seed(seed * 7919 + outputs * 31 + k)
    full = up(outputs, 32) * 32
    n = outputs if gate == "none" else 2 * full
    padded = up(n, 32) * 32
    weight = torch.randn(n, k, generator=generator) / k**0.5
    scale = zero = torch.zeros(0)
    if kind == "fp32":
        stored, dense = weight, weight.double()
    elif kind == "bf16":
        stored = weight.bfloat16()
        dense = stored.double()
    elif kind.startswith("int8"):
        step = weight.abs().amax(1) / 127
        stored = torch.round(weight / step[:, None]).to(torch.int8)
        dense = stored.double() * step.double()[:, None]
        scale, zero = torch.zeros(padded), torch.zeros(padded)
        scale[:n], zero[:n] = step, stored.float().sum(1)
    else:
        groups = up(k, group)
        stored = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(groups, padded, generator=generator) / k**0.5 / 4 + 1e-3).bfloat16()
        zero = torch.randint(5, 11, (groups, padded), generator=generator, dtype=torch.uint8)
        of = torch.arange(k) // group
        dense = (stored.double() - zero.double()[of, :n].T) * scale.double()[of, :n].T
        scale, zero = in_panels(scale), in_panels(zero)
    added = torch.randn(padded, generator=generator) if bias else None
    table, packed_kind = _cpu.Table(name), getattr(_cpu.Kind, kind.upper())
    size = table.packed_bytes(packed_kind, n, k)
    panels = torch.full((size + 2 * GUARD,), 99, dtype=torch.uint8)
    table.pack(packed_kind, stored.data_ptr(), panels.data_ptr() + GUARD, n, k)
    assert bool((panels[:GUARD] == 99).all()) and bool((panels[len(panels) - GUARD :] == 99).all())
    call = _cpu.Linear(
        table, packed_kind, GATES[gate], n, k, group, panels.data_ptr() + GUARD, scale.data_ptr(), zero.data_ptr(),
        0 if added is None else added.data_ptr(), wide or kind == "fp32", outputs,
    )  # fmt: skip
    return Layer(kind, gate, outputs, k, group, dense, added, [panels, scale, zero], call, wide or kind == "fp32")


def rounded(x: torch.Tensor, group: int, levels: int) -> torch.Tensor:
    """x as the arithmetic sees it, in float64: whole multiples of a share of each group's largest number."""
    parts = []
    for part in x.float().split(group, dim=1):
        top = part.abs().amax(1, keepdim=True)
        multiples = torch.round(part * torch.where(top > 0, torch.full_like(top, levels) / top, 0.0))
        parts.append(multiples.double() * (top / levels).double())
    return torch.cat(parts, 1)


def expected(
    layer: Layer, x: torch.Tensor, residual: torch.Tensor | None, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer should give in float64, and how far from it a sum in float may be: a count of roundings."""
    group, levels = {"int8": (layer.k, 127), "int8_a16": (layer.k, 32512), "int4": (layer.group, 127)}.get(
        layer.kind, (0, 0)
    )
    seen = rounded(x, group, levels) if levels else x.double()
    sums, sizes = seen @ layer.dense.T, seen.abs() @ layer.dense.abs().T
    if layer.kind == "int4_a16":
        sizes = seen.abs() @ torch.full_like(layer.dense, 16 * layer.dense.abs().max()).T
    # int8 sums are exact; int4 ones within a group, whose scales are products of floats; bf16 ones add one by one
    roundings = {"int8": 4, "int8_a16": 8, "int4": layer.k / layer.group + 6}.get(layer.kind, layer.k + 8)
    error = sizes * roundings * EPS
    if layer.bias is not None:
        sums = sums + layer.bias[: len(layer.dense)].double()
        error += sums.abs() * EPS
    if layer.gate != "none":
        full = up(layer.outputs, 32) * 32
        pairs = sums.view(len(x), -1, 2, 32), error.view(len(x), -1, 2, 32)
        (g, u), (eg, eu) = ([t[:, :, i].reshape(len(x), full)[:, : layer.outputs] for i in (0, 1)] for t in pairs)
        acted = g * torch.sigmoid(g) if layer.gate == "silu" else torch.nn.functional.gelu(g, approximate="tanh")
        # the slope of both is below 1.2; e to the power of t is off by about t roundings
        return acted * u, acted.abs() * eu + 1.2 * eg * u.abs() + 4e-6 * g.abs() * u.abs() + 1e-30
    sums, error = sums * factor, error * abs(factor) + sums.abs() * abs(factor) * EPS
    if residual is not None:
        sums = sums + residual.double()
        error += sums.abs() * EPS
    return sums, error


def inputs(layer: Layer, rows: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, layer.k, generator=generator) * sizes).to(layer.input_type)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(layer: Layer, rows: int, residual: bool, factor: float, seed: int = 1) -> None:
    x = inputs(layer, rows, seed)
    also = torch.randn(rows, layer.outputs, generator=torch.Generator().manual_seed(seed + 1)).to(layer.input_type)
    y = layer(x, also if residual else None, factor)
    exact, error = expected(layer, x, also if residual else None, factor)
    step = 2.0**-8 if layer.output_type == torch.bfloat16 else 0.0  # half of the last bit
    excess = (y.double() - exact).abs() - error - step * exact.abs()
    assert bool((excess <= step * error).all()), float(excess.max())


shapes = st.tuples(st.integers(1, 40), st.integers(1, 130), st.integers(1, 300))


@every_set
@every_kind
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=shapes, gate=st.sampled_from(["none", "none", "silu", "gelu"]), group=st.sampled_from([64, 128]),
    bias=st.booleans(), residual=st.booleans(), wide=st.booleans(), factor=st.sampled_from([1.0, 0.25, 12.0]),
)  # fmt: skip
def test_it_computes_what_its_numbers_mean(
    name: str, kind: str, shape: tuple[int, int, int], gate: str, group: int, bias: bool, residual: bool, wide: bool,
    factor: float,
) -> None:  # fmt: skip
    rows, outputs, k = shape
    layer = make(name, kind, outputs, k, gate, group, bias, wide)
    plain = gate == "none"
    check(layer, rows, residual and plain and (kind == "fp32" or not wide), factor if plain else 1.0)


@every_kind
@pytest.mark.parametrize("shape", [(1, 896, 4864), (70, 896, 4864), (130, 320, 896), (700, 64, 896)], ids=str)
def test_it_holds_at_the_sizes_of_models(kind: str, shape: tuple[int, int, int]) -> None:
    rows, outputs, k = shape
    check(make(SETS[0], kind, outputs, k, group=128), rows, True, 1.0)


@every_set
@every_kind
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 512), outputs=st.integers(1, 100), k=st.integers(1, 400), seed=st.integers(0, 99),
    gate=st.sampled_from(["none", "silu"]),
)  # fmt: skip
def test_a_rows_bits_do_not_depend_on_the_others(
    name: str, kind: str, count: int, outputs: int, k: int, seed: int, gate: str
) -> None:
    layer = make(name, kind, outputs, k, gate, bias=True, seed=seed)
    x = inputs(layer, count, seed)
    together = layer(x)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert same_bits(layer(x[order].contiguous(), threads=2), together[order])
    assert same_bits(layer(x, threads=2), together)
    for row in {0, count - 1, seed % count}:
        assert same_bits(layer(x[row : row + 1].contiguous()), together[row : row + 1])
    some = count // 2 + 1
    assert same_bits(layer(x[:some].contiguous()), together[:some])


@every_set
@every_kind
def test_every_number_of_rows_gives_the_same_bits(name: str, kind: str) -> None:
    layer = make(name, kind, 40, 1100, bias=True)
    x = inputs(layer, 80)
    alone = torch.cat([layer(x[row : row + 1].contiguous()) for row in range(80)])
    for rows in range(2, 81):
        assert same_bits(layer(x[80 - rows :].contiguous(), threads=1 + rows % 2), alone[80 - rows :])


@every_kind
def test_cuts_of_rows_and_of_inputs_keep_the_bits(kind: str) -> None:
    layer = make(SETS[0], kind, 96, 4864, group=128)
    x = inputs(layer, 500)
    together = layer(x, threads=2)
    assert same_bits(together, torch.cat([layer(x[row : row + 1].contiguous()) for row in range(500)]))


@every_set
@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_is_bad_alone(name: str, kind: str, bad: float) -> None:
    layer = make(name, kind, 70, 301, bias=True)
    x = inputs(layer, 30)
    good = layer(x)
    x[7, 123] = bad
    x[19, 300] = bad
    y = layer(x)
    others = [row for row in range(30) if row not in (7, 19)]
    assert same_bits(y[others], good[others])
    assert not bool(y[[7, 19]].isfinite().any())


@every_set
@every_kind
def test_zeros_give_the_bias(name: str, kind: str) -> None:
    layer = make(name, kind, 33, 65, bias=True, wide=True)
    assert layer.bias is not None
    y = layer(torch.zeros(3, 65, dtype=layer.input_type))
    assert torch.equal(y, layer.bias[:33].expand(3, 33))


@every_set
@every_kind
def test_the_residual_may_be_the_output(name: str, kind: str) -> None:
    layer = make(name, kind, 50, 96)
    x, y = inputs(layer, 20), inputs(make(name, kind, 1, 50), 20, 2)
    want = layer(x, y.clone(), 0.5)
    layer.call(x.data_ptr(), 20, y.data_ptr(), 0.5, y.data_ptr())
    assert same_bits(y, want)


@every_kind
def test_packed_forms_are_the_same_for_all_sets(kind: str) -> None:
    packed = [make(name, kind, 75, 203).tensors[0] for name in SETS]
    assert all(torch.equal(packed[0], other) for other in packed)
