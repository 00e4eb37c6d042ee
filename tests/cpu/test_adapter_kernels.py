"""What adapters add to linear layers: the specification's numbers, and the same bits for a row in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import Delta, Kernels, Up, load, set_threads
from shoal.kernels.api import Mode
from shoal.kernels.cpu import CpuKernels, instruction_sets
from shoal.kernels.ref import RefKernels

BACKENDS = ["ref", *instruction_sets()]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES: list[tuple[str, Mode]] = [("fp32", "plain"), ("bf16", "plain"), ("bf16", "int8"), ("bf16", "int4"),
                                 ("bf16", "int4-a16")]  # fmt: skip


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The specification and the compiled kernels."""
    return backend(request.param)


def backend(name: str) -> Kernels:
    return load("ref") if name == "ref" else CpuKernels(name)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_delta(inputs: int, outputs: list[int], ranks: list[int], seed: int, dtype: torch.dtype) -> Delta:
    """Low-rank deltas of parts that follow each other, each of its own rank and scale."""
    ups, begin, first = [], 0, 0
    for part, (size, rank) in enumerate(zip(outputs, ranks, strict=True)):
        weight = noise(size, rank, seed=seed + part, dtype=dtype) / rank**0.5
        ups.append(Up(weight, 0.5 + part, begin, first))
        begin, first = begin + rank, first + size
    return Delta(noise(sum(ranks), inputs, seed=seed + 9, dtype=dtype) / inputs**0.5, tuple(ups))


def exact(delta: Delta, x: Tensor, outputs: int, factor: float = 1.0) -> Tensor:
    """What it adds, in float64 but for the rounding of the first product."""
    narrow = (x.double() @ delta.down_HK.double().T).to(x.dtype).double()
    added = torch.zeros(len(x), outputs, dtype=torch.float64)
    for up in delta.ups:
        size, rank = up.weight_NR.shape
        part = narrow[:, up.begin : up.begin + rank] @ up.weight_NR.double().T
        added[:, up.first : up.first + size] += part * up.scale * factor
    return added


SHAPES = [(64, [40, 16, 16], [8, 8, 8]), (172, [100], [1]), (36, [7, 5], [3, 130]), (256, [352], [256])]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "ranks"), SHAPES)
def test_a_row_gets_its_adapters_product_and_others_keep_their_bits(
    kernels: Kernels, inputs: int, outputs: list[int], ranks: list[int], dtype: torch.dtype
) -> None:
    total = sum(outputs)
    packed = kernels.pack(noise(total, inputs, dtype=dtype))
    deltas = [make_delta(inputs, outputs, ranks, seed, dtype) for seed in (10, 20, 30)]
    prepared = kernels.pack_deltas([deltas[0], None, deltas[1], deltas[2]], packed)
    x, y = noise(70, inputs, seed=1, dtype=dtype), noise(70, total, seed=2, dtype=dtype)
    adapter_T = torch.arange(70) % 5 - 1
    found = y.clone()
    kernels.add_deltas(x, found, prepared, kernels.group(adapter_T), 0.25)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for number, delta in ((0, deltas[0]), (2, deltas[1]), (3, deltas[2])):
        rows = adapter_T == number
        truth = y[rows].double() + exact(delta, x[rows], total, 0.25)
        assert (found[rows].double() - truth).abs().max() < allowed * truth.abs().max()
        assert not torch.equal(found[rows], y[rows])
    untouched = (adapter_T == -1) | (adapter_T == 1)
    assert torch.equal(found[untouched], y[untouched])


@dataclass(frozen=True)
class Company:
    """Who is in a step, how it is ordered and computed. None of it may change a row's bits."""

    rows: list[int]  # numbers of rows
    threads: int


companies = st.builds(
    Company,
    st.lists(st.integers(0, 199), min_size=1, max_size=150, unique=True),
    st.sampled_from([1, 2, 5]),
)


@settings(deadline=None, max_examples=25)
@given(
    companies, st.sampled_from(BACKENDS), st.sampled_from(list(DTYPES.values())), st.integers(0, 5),
    st.sampled_from(SHAPES),
)  # fmt: skip
def test_grouped_is_one_by_one(
    company: Company, name: str, dtype: torch.dtype, seed: int, shape: tuple[int, list[int], list[int]]
) -> None:
    """Rows in any number and order, of any adapters, with any number of threads, are each row by itself, with no other
    adapter loaded."""
    kernels = backend(name)
    inputs, outputs, ranks = shape
    packed = kernels.pack(noise(sum(outputs), inputs, dtype=dtype))
    deltas = [make_delta(inputs, outputs, ranks, 10 * seed + number, dtype) for number in range(4)]
    every = kernels.pack_deltas(deltas, packed)
    alone = [kernels.pack_deltas([delta], packed) for delta in deltas]
    x, y = noise(200, inputs, seed=seed, dtype=dtype), noise(200, sum(outputs), seed=seed + 1, dtype=dtype)
    adapter_T = torch.randint(-1, 4, (200,), generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor(company.rows)
    found = y[rows]
    set_threads(company.threads)
    kernels.add_deltas(x[rows], found, every, kernels.group(adapter_T[rows]))
    set_threads(1)
    for row, result in zip(company.rows[:20], found, strict=False):
        expected, number = y[row : row + 1].clone(), int(adapter_T[row])
        if number >= 0:
            one = kernels.group(torch.zeros(1, dtype=torch.int64))
            kernels.add_deltas(x[row : row + 1], expected, alone[number], one)
        assert torch.equal(result, expected[0])


@pytest.mark.parametrize(("arithmetic", "mode"), MODES, ids=lambda value: str(value))
@pytest.mark.parametrize("inner", [32, 100, 352])
def test_a_gate_sees_what_adapters_add_to_both_of_its_sides(
    kernels: Kernels, inner: int, arithmetic: str, mode: Mode
) -> None:
    """Rows without an adapter are those of `gated`, to the bit, and each row is itself in any company."""
    dtype, inputs = DTYPES[arithmetic], 96
    weight, bias = noise(2 * inner, inputs, seed=1, dtype=dtype) / 9, noise(2 * inner, seed=2, dtype=dtype)
    x = noise(70, inputs, seed=3, dtype=dtype)
    both = make_delta(inputs, [inner, inner], [8, 8], 10, dtype)
    up_only = Delta(
        noise(4, inputs, seed=4, dtype=dtype) / 9, (Up(noise(inner, 4, seed=5, dtype=dtype), 1.0, 0, inner),)
    )
    adapter_T = torch.arange(70) % 3 - 1
    for activation in ("silu", "gelu"):
        packed = kernels.pack_gated(weight, bias, activation, mode)  # type: ignore[arg-type]
        prepared = kernels.pack_deltas([both, up_only], packed)
        plain = kernels.gated(x, packed)
        found = kernels.gated_with(x, packed, prepared, kernels.group(adapter_T))
        assert torch.equal(found[adapter_T < 0], plain[adapter_T < 0])
        assert torch.equal(kernels.gated_with(x, packed, prepared, kernels.group(adapter_T * 0 - 1)), plain)
        # Against a weight with the deltas merged into it, as far as the arithmetic of the weight allows.
        if mode == "plain":
            for number, delta in enumerate((both, up_only)):
                rows = adapter_T == number
                sums = x[rows].double() @ weight.double().T + bias.double() + exact(delta, x[rows], 2 * inner)
                gate, rest = sums[:, :inner], sums[:, inner:]
                functions = torch.nn.functional
                acted = functions.silu(gate) if activation == "silu" else functions.gelu(gate, approximate="tanh")
                allowed = {"fp32": 1e-5, "bf16": 2e-2}[arithmetic]
                assert (found[rows] - acted * rest).abs().max() < allowed * (acted * rest).abs().max()
        for threads, order in ((2, torch.arange(70).flip(0)), (5, torch.arange(3, 40)), (1, torch.tensor([61]))):
            set_threads(threads)
            again = kernels.gated_with(x[order], packed, prepared, kernels.group(adapter_T[order]))
            assert torch.equal(again, found[order])
        set_threads(1)


@pytest.mark.parametrize(("arithmetic", "mode"), MODES, ids=lambda value: str(value))
def test_the_compiled_kernels_add_what_the_specification_adds(kernels: Kernels, arithmetic: str, mode: Mode) -> None:
    dtype, spec = DTYPES[arithmetic], RefKernels(torch.device("cpu"))
    weight, x = noise(2 * 144, 64, seed=1, dtype=dtype) / 8, noise(50, 64, seed=3, dtype=dtype)
    delta = make_delta(64, [144, 144], [16, 16], 10, dtype)
    adapter_T = torch.arange(50) % 2 - 1
    results = []
    for each in (spec, kernels):
        packed = each.pack_gated(weight, None, "silu", mode)
        results.append(each.gated_with(x, packed, each.pack_deltas([delta], packed), each.group(adapter_T)).float())
    allowed = {"fp32": 1e-5, "bf16": 3e-2}[arithmetic]
    assert (results[0] - results[1]).abs().max() < allowed * results[0].abs().max()


def test_no_rows_and_no_adapters_are_nothing_to_do(kernels: Kernels) -> None:
    packed = kernels.pack(noise(40, 64))
    prepared = kernels.pack_deltas([None, None], packed)
    x, y = noise(3, 64), noise(3, 40)
    for adapter_T in (torch.tensor([-1, -1, -1]), torch.tensor([0, 1, -1])):
        found = y.clone()
        kernels.add_deltas(x, found, prepared, kernels.group(adapter_T))
        assert torch.equal(found, y)
    kernels.add_deltas(x[:0], y[:0], prepared, kernels.group(torch.zeros(0, dtype=torch.int64)))
