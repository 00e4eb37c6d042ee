"""The team of threads behind the compiled kernels: each piece of work is done once, however many come or call."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from shoal.kernels import _cpu, set_threads  # type: ignore[attr-defined]  # compiled
from shoal.kernels.cpu import CpuKernels, instruction_sets


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_threads(before)


@pytest.fixture
def kernels() -> CpuKernels:
    return CpuKernels(instruction_sets()[0])


def products(kernels: CpuKernels, threads: int, rows: int = 300) -> torch.Tensor:
    """A product large enough that a team is asked for."""
    generator = torch.Generator().manual_seed(4)
    packed = kernels.pack(torch.randn(700, 300, generator=generator).bfloat16())
    x = torch.randn(rows, 300, generator=generator).bfloat16()
    set_threads(threads)
    return kernels.linear(x, packed)


def test_a_team_grows_and_shrinks_and_says_how_large_it_is(kernels: CpuKernels) -> None:
    alone = products(kernels, 1)
    for threads in (7, 2, 1, 3):
        assert torch.equal(products(kernels, threads), alone)
        assert _cpu.threads() == torch.get_num_threads() == threads
    _cpu.set_threads(0)
    assert _cpu.threads() == 1


def test_callers_from_several_threads_do_not_disturb_each_other(kernels: CpuKernels) -> None:
    alone, wrong = products(kernels, 1), []

    def call() -> None:
        for _ in range(30):
            if not torch.equal(products(kernels, 3), alone):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_process_that_has_forked_computes_without_its_parents_threads(kernels: CpuKernels) -> None:
    expected = products(kernels, 3)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernels.linear(*again(kernels)), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def again(kernels: CpuKernels) -> tuple[torch.Tensor, object]:
    """The same input, made without torch's own threads, which do not survive a fork."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(4)
    packed = kernels.pack(torch.randn(700, 300, generator=generator).bfloat16())
    return torch.randn(300, 300, generator=generator).bfloat16(), packed


def test_helpers_that_sleep_are_woken(kernels: CpuKernels) -> None:
    alone = products(kernels, 1)
    for _ in range(5):
        threading.Event().wait(0.05)  # longer than a helper looks out for work
        assert torch.equal(products(kernels, 4), alone)
