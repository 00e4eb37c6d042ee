"""The team of threads behind the compiled kernels: each piece of work is done once, however many come or call."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
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


def test_a_team_whose_size_changes_while_it_works_computes_the_same(kernels: CpuKernels) -> None:
    alone, wrong = products(kernels, 1), []

    def call(threads: int) -> None:
        for i in range(30):
            if not torch.equal(products(kernels, (threads + i) % 5 + 1), alone):
                wrong.append(threads)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
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


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_has_forked_gets_helpers_of_its_own(kernels: CpuKernels) -> None:
    """Also when its parent's were at work at that moment."""
    stop, expected = threading.Event(), products(kernels, 3)

    def call() -> None:
        while not stop.is_set():
            products(kernels, 3)

    busy = threading.Thread(target=call)
    busy.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                right = torch.equal(kernels.linear(*again(kernels)), expected)
                os._exit(0 if right and helpers() == 2 else 1)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        busy.join()


def helpers() -> int:
    """Threads of this process besides the one that Python began with."""
    return len(os.listdir("/proc/self/task")) - 1


REFUSING = """
import ctypes, os, sys, torch
from shoal.kernels import _cpu
from shoal.kernels.cpu import CpuKernels, instruction_sets

def stacks(size):
    assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size)) == 0
    assert libc.pthread_setattr_default_np(attributes) == 0

libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
assert libc.pthread_attr_init(attributes) == 0
torch.set_num_threads(1)
kernels = CpuKernels(instruction_sets()[0])
packed, x = kernels.pack(torch.randn(700, 300).bfloat16()), torch.randn(40, 300).bfloat16()
alone, began = kernels.linear(x, packed), len(os.listdir("/proc/self/task"))
_cpu.set_threads(2)
kernels.linear(x, packed)
stacks(1 << 50)  # more than there are addresses
_cpu.set_threads(4)
assert all(torch.equal(kernels.linear(x, packed), alone) for _ in range(50))
print(len(os.listdir("/proc/self/task")) - began, end=" ")
stacks(1 << 20)
assert all(torch.equal(kernels.linear(x, packed), alone) for _ in range(1500))
print(len(os.listdir("/proc/self/task")) - began)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "pthread_setattr_default_np"), reason="needs glibc")
def test_a_team_that_gets_no_more_threads_goes_on_with_those_it_has_and_asks_again_later() -> None:
    checked = "import tools.checked_extension\n" if "SHOAL_CHECKED" in os.environ else ""  # under `make sanitize`
    run = subprocess.run([sys.executable, "-c", checked + REFUSING], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.split()) == (0, ["1", "3"]), run.stderr


def test_helpers_that_sleep_are_woken(kernels: CpuKernels) -> None:
    alone = products(kernels, 1)
    for _ in range(5):
        threading.Event().wait(0.05)  # longer than a helper looks out for work
        assert torch.equal(products(kernels, 4), alone)
