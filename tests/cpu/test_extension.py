"""The compiled kernel, for every instruction set this machine has, against torch."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shoal.kernels.cpu import CpuKernels, choose, instruction_sets

EPS = 1e-6
SHAPES = [(0, 64), (1, 1), (1, 15), (3, 16), (7, 64), (5, 100), (33, 896), (2, 4099)]
TYPES = [torch.float32, torch.bfloat16]


def rows_of(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_007 + columns)
    x = torch.randn(rows, columns, generator=generator) * 3
    weight = torch.randn(columns, generator=generator)
    return x.to(dtype), weight


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    return exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_what_torch_does(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = rows_of(*shape, dtype)
    out = CpuKernels(name).rms_norm(x, weight, EPS)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21
    exact = reference(x, weight)
    assert out.dtype == dtype
    assert bool(((out.double() - exact).abs() <= step * exact.abs() + 1e-30).all())


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    kernels = CpuKernels(name)
    x, weight = rows_of(33, 896, dtype)
    together = kernels.rms_norm(x, weight, EPS)
    alone = torch.cat([kernels.rms_norm(x[row : row + 1], weight, EPS) for row in range(33)])
    backwards = kernels.rms_norm(x.flip(0).contiguous(), weight, EPS).flip(0)
    assert torch.equal(together, alone) and torch.equal(together, backwards)


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_that_are_none_stay_so(name: str, dtype: torch.dtype) -> None:
    x, weight = rows_of(3, 40, dtype)
    x[1, 17] = float("nan")
    x[2, 39] = float("inf")
    out = CpuKernels(name).rms_norm(x, weight, EPS)
    assert bool(torch.isfinite(out[0]).all()) and bool(torch.isnan(out[1]).all()) and bool(torch.isnan(out[2, 39]))


def test_every_machine_can_run_the_plain_one() -> None:
    assert instruction_sets()[-1] == "scalar"


def test_the_environment_chooses_and_a_wrong_choice_is_an_error() -> None:
    assert choose({}) == instruction_sets()[0]
    assert choose({"SHOAL_ISA": "scalar"}) == "scalar"
    with pytest.raises(ValueError, match="unset it or name one of these"):
        choose({"SHOAL_ISA": "mmx"})
    with pytest.raises(ValueError, match="mmx"):
        CpuKernels("mmx")


@pytest.mark.parametrize("name", instruction_sets())
def test_one_variable_is_enough_to_force_it(name: str) -> None:
    assert CpuKernels(choose({"SHOAL_ISA": name})).name == name


def test_shapes_that_do_not_match_are_caught_before_the_kernel() -> None:
    kernels = CpuKernels("scalar")
    x, weight = rows_of(2, 8, torch.float32)
    for wrong in (weight[:4], weight.bfloat16(), weight.repeat(2)[::2]):
        with pytest.raises(AssertionError):
            kernels.rms_norm(x, wrong, EPS)


def test_other_threads_run_meanwhile() -> None:
    x, weight = rows_of(1, 4096, torch.float32)
    x = x.expand(20_000, -1).contiguous()
    kernels, inside, seen = CpuKernels("scalar"), threading.Event(), []

    def work() -> None:
        inside.set()
        began = time.monotonic()
        kernels.rms_norm(x, weight, EPS)
        seen.append((began, time.monotonic()))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    ticks = []
    while thread.is_alive():
        ticks.append(time.monotonic())
    began, ended = seen[0]
    assert sum(began < tick < ended for tick in ticks) > 10
