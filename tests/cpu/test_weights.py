"""A checkpoint is read whole or refused with the name of what is wrong, before any of it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from naive import generate
from safetensors.torch import load_file, save_file
from small_models import save_model

from shoal.core.errors import ModelError
from shoal.kernels import load
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import DTYPES, expected_shapes, load_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model("qwen3", tmp_path)
    return tmp_path


def answer(folder: Path) -> torch.Tensor:
    config = read_config(folder)
    return generate(Decoder(config, load_weights(folder, config), load("auto")), [[1, 2, 3]], 2)[0][1]


def change(folder: Path, **edits: torch.Tensor | None) -> None:
    """Rewrite the checkpoint with tensors replaced, added, or (None) left out; dots are written as double bars."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in edits.items():
        plain = name.replace("__", ".")
        if tensor is None:
            del tensors[plain]
        else:
            tensors[plain] = tensor
    save_file(tensors, folder / "model.safetensors")


def refuses(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_weights(folder, read_config(folder))


def test_a_sharded_checkpoint_is_the_single_one(folder: Path) -> None:
    single = answer(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {tensor: names[i % 3] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if where[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(answer(folder), single)
    (folder / names[1]).unlink()
    refuses(folder, f"{names[1]}: is named by model.safetensors.index.json and missing")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    refuses(folder, "which is not a file beside it")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuses(folder, "no readable weight_map")


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    model = save_model("smollm", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.isfinite(answer(tmp_path)).all()
    before = answer(tmp_path)
    change(tmp_path, lm_head__weight=torch.zeros(model.config.vocab_size, model.config.hidden_size))
    assert torch.equal(answer(tmp_path), before)


def test_a_prefix_of_names_and_the_picture_half_do_not_matter(folder: Path) -> None:
    before = answer(folder)
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "vision_tower.patch.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert torch.equal(answer(folder), before)


def test_what_is_wrong_with_a_tensor_is_named(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    change(folder, **{Q_PROJ.replace(".", "__"): None})
    refuses(folder, r"layers\.1\.self_attn\.q_proj\.weight with shape \[128, 64\] is missing")
    save_file({**whole, Q_PROJ: torch.zeros(64, 64)}, folder / "model.safetensors")
    refuses(folder, rf"{Q_PROJ} has shape \[64, 64\]; config.json calls for \[128, 64\]")
    save_file({**whole, Q_PROJ: torch.zeros(128, 64, dtype=torch.int8)}, folder / "model.safetensors")
    refuses(folder, rf"{Q_PROJ} is stored as I8")
    save_file({**whole, Q_PROJ.replace("weight", "bias"): torch.zeros(128)}, folder / "model.safetensors")
    refuses(folder, r"q_proj\.bias is not part of a qwen3 model")


def test_files_that_are_not_safetensors_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(folder, "is not a whole safetensors file")
    path.unlink()
    refuses(folder, "has no model.safetensors: give the folder of a checkpoint")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    refuses(folder, r"pytorch_model\.bin: only safetensors are read, as pickle files can run code; convert")


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_read_in_the_asked_type(folder: Path, dtype: str) -> None:
    config = read_config(folder)
    weights = load_weights(folder, config, DTYPES[dtype])
    stored = load_file(folder / "model.safetensors")
    taken = weights.take("layers.1.self_attn.q_proj.weight")
    assert taken.dtype == DTYPES[dtype]
    assert torch.equal(taken, stored[Q_PROJ].to(DTYPES[dtype]))
    assert weights.norm("norm").dtype == torch.float32
    assert expected_shapes(config)["norm.weight"] == (64,)


def test_half_precision_answers_are_near(folder: Path) -> None:
    config = read_config(folder)
    answers = []
    for dtype in DTYPES.values():
        decoder = Decoder(config, load_weights(folder, config, dtype), load("auto"))
        answers.append(generate(decoder, [list(range(50))], 1)[0][1].log_softmax(-1))
    assert (answers[0] - answers[1]).abs().max() < 0.3
