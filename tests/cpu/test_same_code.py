"""A real run and its simulation are two schedulers of one class: told the same, they plan the same, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.live import pretended, real, repeated, traffic
from shoal.build import build_engine
from shoal.core.config import EngineConfig
from shoal.sim.fit import fit_cost
from shoal.sim.replay import written


@pytest.fixture(scope="module")
def built():
    made = build_engine(EngineConfig(memory_bytes=8 << 20))
    yield made
    made.close()


def test_a_real_run_is_planned_again_from_its_record(built):
    asked = traffic(1, 24, 60.0, built.facts.vocab_size)
    run, placed = real(built, asked)
    assert len(run.record.plans) > 10
    plans = written(run.record.plans)
    assert written(repeated(built, placed, run.record)) == plans
    prompt = placed[5].prompt[:]
    prompt[-1] ^= 1  # one token of one prompt: the plans must show it
    changed = [replace(request, prompt=prompt) if request.index == 5 else request for request in placed]
    again = written(repeated(built, changed, run.record))
    assert again != plans and len(again) == len(plans)


def test_what_is_learnt_from_a_run_predicts_its_own_course(built):
    asked = traffic(3, 24, 200.0, built.facts.vocab_size)
    run, _ = real(built, asked)
    guess = pretended(built, asked, fit_cost(run.record.steps))
    assert 0.5 < guess.makespan / run.makespan < 2.0
    assert all(seconds > 0 for seconds in guess.first)
