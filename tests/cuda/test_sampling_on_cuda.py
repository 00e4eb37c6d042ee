"""Draws and scores of the plain torch kernels on a card: integer for integer those of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal.kernels import Draws, load

if not torch.cuda.is_available():
    pytest.skip("no CUDA card that torch can use", allow_module_level=True)


def test_the_card_draws_and_scores_as_the_cpu_does() -> None:
    cpu, cuda = load("ref"), load("ref", "cuda")
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5003, generator=dice) * 3
    count = torch.arange(40)
    draws = Draws(
        row_S=count, number_S=torch.randint(-(2**63), 2**63 - 1, (40,), generator=dice), best_S=x.max(1).values,
        heat_S=torch.rand(40, generator=dice) + 0.3, top_k_S=count % 4 * 20, top_p_S=1 - count.double() % 3 / 10,
        min_p_S=count.float() % 2 / 50,
    )  # fmt: skip
    there = Draws(*(getattr(draws, field.name).cuda() for field in dataclasses.fields(draws)))
    assert torch.equal(cuda.draw(x.cuda(), there).cpu(), cpu.draw(x, draws))
    expected = cpu.score(x, count, count * 7, 9)
    found = cuda.score(x.cuda(), count.cuda(), (count * 7).cuda(), 9)
    for field in dataclasses.fields(expected):
        assert torch.equal(getattr(found, field.name).cpu(), getattr(expected, field.name)), field.name
