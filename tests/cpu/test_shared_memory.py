"""Engines that share a memory: what each is given, also in place of another, and what is said of too little."""

from __future__ import annotations

from array import array
from pathlib import Path
from unittest import mock

import pytest
from small_models import save_model

from shoal.build import build_engine
from shoal.core.config import EngineConfig
from shoal.core.types import TOKEN, Request, Sampling
from shoal.runtime.memory import RESERVE_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return path


def test_an_engine_in_place_of_another_is_given_its_share_and_not_a_part_of_what_is_left(folder: Path) -> None:
    config = EngineConfig(model=str(folder), block_size=16)
    block = 2 * 3 * 16 * 2 * 32 * 4
    weights = sum(p.numel() for p in save_model("llama", folder).parameters()) * 4

    def build(free_blocks: int, *, times: int, kv_bytes: int | None) -> int:
        free = times * (weights + RESERVE_BYTES + free_blocks * block)
        with mock.patch("shoal.build.available_bytes", lambda device: free):
            built = build_engine(config, share=2, kv_bytes=kv_bytes)
        built.close()
        return built.facts.memory.num_blocks

    first = build(200, times=2, kv_bytes=None)
    assert first == 200
    assert build(300, times=1, kv_bytes=first * block) == 200, "what is left is its alone, and no more than it had"
    assert build(100, times=1, kv_bytes=first * block) == 100, "and less where there is no more"


def test_a_row_too_large_for_a_shared_memory_is_told_that_fewer_devices_help(folder: Path) -> None:
    config = EngineConfig(model=str(folder), memory_bytes=10**6, block_size=16)
    wants = Request("large", array(TOKEN, [1] * 1000), Sampling(max_tokens=4))
    for share in (1, 3):
        built = build_engine(config, share=share)
        refused = built.engine.add(wants)
        built.close()
        assert refused is not None and "raise --memory" in refused.error
        assert ("name fewer devices: 3 share one memory" in refused.error) == (share == 3)
