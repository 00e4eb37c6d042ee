"""What explain counts and measures instead of loading a model: its sizes are the tensors', its curves rise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_published_configs import PUBLISHED

from shoal.bench import calibrate
from shoal.kernels import load
from shoal.nn.arch import make_config
from shoal.nn.weights import KV_DTYPES, MODES, expected_shapes, model_bytes
from shoal.preview import machine
from shoal.preview.sizes import Sizes
from shoal.text.checkpoint import EMBEDDED


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_tensors(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes, config = Sizes.load(tmp_path), make_config(values)
    for mode in MODES:
        assert sizes.weight_bytes(mode) == pytest.approx(
            model_bytes(config, mode), rel=0.01 if "int" not in mode else 0.1
        )
    heads = config.num_kv_heads, config.head_dim
    for kv, dtype in KV_DTYPES.items():
        block = config.num_layers * load("cpu").kv_bytes(32, *heads, dtype)
        assert 32 * sizes.position_bytes(kv) == block
    assert sizes.tied == ("lm_head.weight" not in expected_shapes(config))


def test_a_measurement_rises_with_what_is_measured() -> None:
    found = machine._measure(EMBEDDED, "bf16", "bf16", None)
    for curve in (found.layers, found.answers):
        amounts, seconds = zip(*curve, strict=True)
        assert list(amounts) == sorted(set(amounts)) and min(amounts) == 1
        assert list(seconds) == sorted(seconds) and seconds[0] > 0
    assert found.layers[-1][1] > 4 * found.layers[0][1]
    assert (
        found.pair >= 0
        and found.read >= 0
        and found.draw >= 0
        and found.score >= 0
        and found.start > 0
        and found.build > 0
    )
    assert found.threads == torch.get_num_threads() and found.measured_bytes > 10**6
    assert found.unsteady >= 0 and found.listed >= 0 and found.opened >= 0


@pytest.mark.parametrize("pattern", [[1.0], [1.0, 2.0], [2.0, 2.0, 1.0, 2.0]])
def test_a_machine_that_is_slow_at_times_is_as_slow_as_on_the_whole_and_its_parts_compare(pattern: list[float]) -> None:
    speeds = [pattern[number % len(pattern)] for number in range(calibrate.ROUNDS)]
    turns = {("a", 1): iter(speeds), ("b", 1): iter(speeds)}
    took, unsteady = calibrate.timed({
        ("a", 1): lambda: 0.001 * next(turns["a", 1]), ("b", 1): lambda: 0.003 * next(turns["b", 1]),
    })  # fmt: skip
    assert took["b", 1] == pytest.approx(3 * took["a", 1])
    assert took["a", 1] == pytest.approx(0.001 * sum(speeds) / len(speeds))
    assert unsteady == pytest.approx(max(speeds) / min(speeds) - 1)
