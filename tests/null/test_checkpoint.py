"""Which folder a name means, and what a folder's small files say about requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.core.errors import ModelError, UsageError
from shoal.models import embedded_path
from shoal.text.checkpoint import ModelInfo, resolve_model

WORDS: Any = SimpleNamespace(eos=frozenset({2}))


def resolve_alone(name: str, home: Path) -> str:
    """What `resolve_model` gives or says in a process without a network and with the hub's cache at `home`."""
    script = (
        "import sys\nfrom shoal.text.checkpoint import resolve_model\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_a_name_is_a_folder_or_nothing_is_the_embedded_model(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("") == embedded_path()
    for wrong in (str(tmp_path / "nowhere"), "no-owner", "a/b/c"):
        with pytest.raises(ModelError, match="is not a folder"):
            resolve_model(wrong)


def test_an_id_of_the_hub_that_is_not_cached_is_a_clear_error_offline(tmp_path: Path) -> None:
    said = resolve_alone("nobody/nothing", tmp_path)
    assert said.startswith("ModelError nobody/nothing is neither a folder nor in the hub's cache")
    assert "give its folder" in said


def test_a_model_in_the_hubs_cache_is_found_without_a_network(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "abc123").symlink_to(model)
    assert Path(resolve_alone("some/model", tmp_path)).resolve() == model


def info(folder: Path, config: object, generation: object = None, context: int | None = None) -> ModelInfo:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelInfo.load(folder, WORDS, context)


def test_requests_must_fit_what_config_json_says(tmp_path: Path) -> None:
    found = info(tmp_path, {"max_position_embeddings": 512, "vocab_size": 99})
    assert (found.context, found.vocab_size, found.eos, found.sampling) == (512, 99, {2}, {})
    assert info(tmp_path, {"max_position_embeddings": 512, "vocab_size": 99}, context=64).context == 64
    inside = {"text_config": {"max_position_embeddings": 128, "vocab_size": 5}, "model_type": "gemma3"}
    assert (info(tmp_path, inside).context, info(tmp_path, inside).vocab_size) == (128, 5)
    with pytest.raises(ModelError, match="max_position_embeddings"):
        info(tmp_path, {"vocab_size": 99})
    with pytest.raises(UsageError, match="context of 0"):
        info(tmp_path, {"max_position_embeddings": 512, "vocab_size": 99}, context=0)


def test_a_folder_without_config_json_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        ModelInfo.load(tmp_path, WORDS)


def test_the_generation_config_decides_for_silent_requests(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 512, "vocab_size": 99}
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 77, "eos_token_id": 2, "do_sample": True}
    found = info(tmp_path, config, said)
    assert found.sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert found.max_tokens == 77
    assert info(tmp_path, config, {"do_sample": False, "temperature": 0.6}).sampling == {"temperature": 0.0}
    assert info(tmp_path, config, {"temperature": None, "top_k": "x", "min_p": True}).sampling == {}
