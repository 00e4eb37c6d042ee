"""Layers taken whole give the bits of their parts, and are taken whole wherever they can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from naive import generate
from small_models import save_model
from torch import Tensor

from shoal.bench.watch import watched
from shoal.kernels import load, set_threads
from shoal.kernels.cpu import CpuKernels, instruction_sets
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import MODES, load_weights

PROMPTS = [[(7 * i * n) % 199 for i in range(n)] for n in (3, 40, 270)]


def decoder_of(folder: Path, weights: str, name: str) -> Decoder:
    config = read_config(folder)
    return Decoder(config, load_weights(folder, config, *MODES[weights]), CpuKernels(name))


def answers(decoder: Decoder, whole: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], int]:
    """Logits of each prompt's answer, and how many layers were taken whole."""
    taken, take = [0], type(decoder.kernels).layers

    def counted(x_TD: Tensor, prepared: Sequence[object], *others: object) -> Tensor | None:
        done = take(decoder.kernels, x_TD, prepared, *others) if whole else None  # type: ignore[arg-type]
        taken[0] += 0 if done is None else len(prepared)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(decoder.kernels, "layers", counted)
        return [logits for _, logits in generate(decoder, PROMPTS, 3)], taken[0]


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4+head"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2", "olmo2", "granite", "phi3"])
def test_a_whole_layer_gives_the_bits_of_its_parts(
    model: str, weights: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms before, after and both; windows, caps, factors, biases; prompts of several tiles and decodes."""
    save_model(model, tmp_path)
    set_threads(2)
    decoder = decoder_of(tmp_path, weights, name)
    parts, none = answers(decoder, False, monkeypatch)
    whole, taken = answers(decoder, True, monkeypatch)
    assert none == 0 and taken >= 2 * (len(decoder.layers) - 1)
    assert all(torch.equal(found, expected) for found, expected in zip(whole, parts, strict=True))


def test_watched_kernels_are_called_part_by_part(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    decoder = decoder_of(tmp_path, "bf16", instruction_sets()[0])
    before = generate(decoder, PROMPTS, 2)
    with watched(decoder.kernels) as watch:
        seen = generate(decoder, PROMPTS, 2)
    assert watch.calls["linear"] == watch.calls["attention"] * 3 == 3 * watch.calls["gated"] > 0
    assert all(torch.equal(one[1], other[1]) for one, other in zip(before, seen, strict=True))


def test_the_specification_has_no_whole_layers(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = read_config(tmp_path)
    assert Decoder(config, load_weights(tmp_path, config), load("ref")).whole == [None] * config.num_layers
