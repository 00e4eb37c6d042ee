"""Configuration is checked once, and the public face is what is meant."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

import shoal
from shoal.core.config import EngineConfig, parse_bytes
from shoal.core.errors import UsageError


def test_a_config_survives_the_way_through_a_mapping() -> None:
    config = EngineConfig(model="x", memory_bytes=10**9, overlap=False, context=512)
    assert EngineConfig.from_mapping(config.to_mapping()) == config
    assert len(fields(EngineConfig)) <= 40


def test_an_unknown_name_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(UsageError, match="did you mean 'block_size'"):
        EngineConfig.from_mapping({"blok_size": 16})
    with pytest.raises(UsageError, match="known are model"):
        EngineConfig.from_mapping({"zzzz": 16})


@pytest.mark.parametrize(
    ("name", "value"), [("block_size", "32"), ("overlap", 1), ("seed", True), ("model", None), ("context", 1.5)]
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        EngineConfig.from_mapping({name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"block_size": 24},
        {"block_size": 0},
        {"step_tokens": 0},
        {"weights": "int3"},
        {"kv": "fp8"},
        {"device": "tpu"},
        {"context": 0},
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        EngineConfig.from_mapping(values)


def test_a_config_does_not_rewrite_itself() -> None:
    config = EngineConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert config.memory_bytes is None  # found out by build, written nowhere


@pytest.mark.parametrize(
    ("text", "count"),
    [("800MB", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096), (" 2 g ", 2 * 10**9), ("1kib", 1024)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 parsec", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


def test_the_public_face_is_what_is_meant_and_costs_no_torch() -> None:
    script = (
        "import sys, shoal; print([n for n in shoal.__all__ if not n.startswith('_')], 'torch' in sys.modules);"
        "shoal.LLM; print('torch' in sys.modules)"
    )
    names, late = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split("\n")[:2]
    public = (
        "LLM CompletionOutput Counts EngineConfig Explained Logprob RequestOutput Result SamplingParams ShoalError "
        "Stream"
    )
    assert names == f"{[*public.split(), 'StructuredOutputsParams', 'explain', 'run']} False"
    assert late == "True"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shoal.nothing  # noqa: B018
