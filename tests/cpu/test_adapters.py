"""LoRA adapters: a row answers as a model with its adapter merged into the weights, whoever else is in the step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import EVERY, FUSED, merged, save_adapter
from naive import generate
from safetensors.torch import load_file, save_file
from small_models import reference, save_model
from torch import Tensor

from shoal.core.errors import ModelError
from shoal.kernels import load
from shoal.nn.adapter import load_adapter
from shoal.nn.arch import read_config
from shoal.nn.decoder import Decoder
from shoal.nn.weights import MODES, load_weights

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"rank": 1, "alpha": 3}),
    "phi3": ("phi3", {"targets": FUSED}),
    "gemma2": ("gemma2", {"rank": 16}),
    "olmo2": ("olmo2", {"targets": ("o_proj", "down_proj")}),
    "granite": ("granite", {"strength": 0.5}),
    "rslora": ("llama3", {"use_rslora": True, "rank": 64}),
    "wide": ("llama3", {"rank": 256, "targets": ("q_proj", "v_proj", "up_proj")}),
    "patterns": ("qwen3", {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "gate_proj": 20},
                           "alpha_pattern": {"down_proj": 5}}),
}  # fmt: skip


def prompts_of(count: int, seed: int = 3) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(199) for _ in range(dice.choice((3, 20, 41)))] for _ in range(count)]


def answer(decoder: Decoder, prompts: list[list[int]], adapters: list[int], num_tokens: int = 8, **how: Any) -> Any:
    """Greedy tokens and logits of each prompt under the adapter of that number, -1 for none."""
    return generate(decoder, prompts, num_tokens, adapters=adapters, **how)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_a_row_answers_as_the_merged_model(variant: str, backend: str, tmp_path: Path) -> None:
    name, how = VARIANTS[variant]
    model = save_model(name, tmp_path / "base")
    adapter = tmp_path / "adapter"
    tensors = save_adapter(model, adapter, **how)
    whole = merged(model, adapter, tensors)
    config, kernels = read_config(tmp_path / "base"), load(backend)
    decoder = Decoder(
        config, load_weights(tmp_path / "base", config), kernels, [load_adapter(adapter, config, torch.float32)]
    )
    prompts = prompts_of(4)
    found = answer(decoder, prompts, [0, -1, 0, -1])
    changed = False
    for prompt, judge, (tokens, logits) in zip(prompts, (whole, model, whole, model), found, strict=True):
        expected, expected_logits = reference(judge, prompt, 8)
        assert tokens == expected
        torch.testing.assert_close(logits, expected_logits, atol=2e-3, rtol=1e-3)
        changed = changed or reference(whole, prompt, 8)[0] != reference(model, prompt, 8)[0]
    assert changed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    """A model, its folder, and three adapters of different ranks and layers."""
    root = tmp_path_factory.mktemp("small")
    model = save_model("qwen2", root / "base")
    folders = [root / f"adapter{i}" for i in range(3)]
    save_adapter(model, folders[0], seed=11)
    save_adapter(model, folders[1], seed=12, rank=40, targets=("q_proj", "v_proj"))
    save_adapter(model, folders[2], seed=13, rank=3, targets=("gate_proj", "down_proj", "o_proj"))
    return model, root / "base", folders


def decoder_of(base: Path, folders: list[Path], weights: str, backend: str) -> Decoder:
    config = read_config(base)
    arithmetic = MODES[weights]
    adapters = [load_adapter(folder, config, arithmetic.dtype) for folder in folders]
    return Decoder(config, load_weights(base, config, *arithmetic), load(backend), adapters)


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_a_row_has_the_same_bits_in_any_company_of_adapters(
    small: tuple[Any, Path, list[Path]], weights: str, backend: str
) -> None:
    """Whoever else is in the step, whichever adapters are loaded beside its own, however the prompt is cut."""
    _, base, folders = small
    decoder = decoder_of(base, folders, weights, backend)
    prompts, adapters = prompts_of(8), [0, -1, 1, 2, -1, 0, 2, 1]
    together = answer(decoder, prompts, adapters)
    assert len({tuple(answer(decoder, [prompts[1]], [number])[0][0]) for number in (-1, 0, 1, 2)}) == 4

    def check(decoder: Decoder, rows: list[int], numbers: list[int], **how: Any) -> None:
        for row, (tokens, logits) in zip(
            rows, answer(decoder, [prompts[i] for i in rows], numbers, **how), strict=True
        ):
            assert tokens == together[row][0]
            assert torch.equal(logits, together[row][1])

    check(decoder, list(range(8)), adapters, chunk=7)
    check(decoder, [6, 0, 4, 2], [adapters[i] for i in (6, 0, 4, 2)], seed=5)
    for row in (1, 2, 5, 6):
        check(decoder, [row], [adapters[row]])
    check(decoder_of(base, [folders[1]], weights, backend), [2, 7, 1], [0, 0, -1])
    plain = decoder_of(base, [], weights, backend)
    check(plain, [1, 4], [-1, -1])
    for row, (tokens, logits) in zip((1, 4), generate(plain, [prompts[1], prompts[4]], 8), strict=True):
        assert tokens == together[row][0] and torch.equal(logits, together[row][1])


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_adapters_over_rounded_weights_are_near_the_merged_model(
    small: tuple[Any, Path, list[Path]], weights: str
) -> None:
    model, base, folders = small
    whole = merged(model, folders[0], load_file(folders[0] / "adapter_model.safetensors"))
    prompts = prompts_of(3)
    for prompt, (_, logits) in zip(
        prompts, answer(decoder_of(base, folders, weights, "cpu"), prompts, [0, 0, 0], 1), strict=True
    ):
        expected = reference(whole, prompt, 1)[1]
        assert (logits - expected).norm() < {"bf16": 0.05, "int8": 0.15}[weights] * expected.norm()


def test_steps_without_adapters_call_nothing_more(
    small: tuple[Any, Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, folders = small
    decoder = decoder_of(base, folders, "fp32", "cpu")
    for name in ("add_deltas", "gated_with", "group"):
        monkeypatch.setattr(type(decoder.kernels), name, None)
    generate(decoder, prompts_of(2), 3)


# -- what cannot be computed is refused ---------------------------------------------------------------


def rewrite(
    folder: Path, changes: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
) -> None:
    """Change settings, and replace, add or (None) remove tensors."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(changes or {})}))
    held = load_file(folder / "adapter_model.safetensors")
    for name, tensor in (tensors or {}).items():
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
    save_file(held, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.1.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], list[str]]] = {
    "another kind": ({"peft_type": "IA3"}, {}, ["peft_type is 'IA3'", "merge_and_unload"]),
    "DoRA": ({"use_dora": True}, {}, ["use_dora", "DoRA scales", "merge_and_unload"]),
    "DoRA's tensor": ({}, {f"{Q}.lora_magnitude_vector": torch.ones(64)}, ["DoRA", "merge_and_unload"]),
    "whole layers": ({"modules_to_save": ["lm_head"]}, {}, ["modules_to_save", "replaces whole layers"]),
    "a whole layer's tensor": ({}, {"base_model.model.lm_head.weight": torch.ones(199, 64)}, ["lm_head", "merge"]),
    "an adapted head": (
        {}, {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 64)}, ["lm_head", "inside decoder layers"],
    ),
    "an embedding": (
        {}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 199)}, ["embed_tokens", "merge"],
    ),
    "biases": ({"bias": "lora_only"}, {}, ["bias is 'lora_only'"]),
    "a bias of B": ({}, {f"{Q}.lora_B.bias": torch.ones(64)}, ["lora_B.bias", "merge"]),
    "a setting nobody knows": ({"use_new_thing": True}, {}, ["use_new_thing", "not supported"]),
    "changed base weights": ({"init_lora_weights": "pissa"}, {}, ["pissa", "path_initial_model_for_weight_conversion"]),
    "a rank of its own": ({"rank_pattern": {"q_proj": 4}}, {}, ["q_proj", "[8, 64]", "[4, 64]"]),
    "a large rank": ({"r": 512}, {}, ["rank 512", "256"]),
    "no rank": ({"r": None}, {}, ["r must be a number"]),
    "another width": (
        {}, {f"{Q}.lora_A.weight": torch.ones(8, 96)}, ["[8, 96]", "[8, 64]", "'some/base'", "model it was trained on"],
    ),
    "half a pair": ({}, {f"{Q}.lora_B.weight": None}, ["lora_B", "q_proj is missing"]),
    "a layer that is not there": (
        {}, {f"{Q.replace('.1.', '.9.')}.lora_A.weight": torch.ones(8, 64)}, ["layers.9", "'some/base'"],
    ),
    "a layer too few": (
        {}, {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, ["nothing for", "q_proj", "cut"],
    ),
    "a layer too many": ({"target_modules": ["k_proj"]}, {}, ["do not name", "target_modules"]),
    "whole numbers": ({}, {f"{Q}.lora_A.weight": torch.ones(8, 64, dtype=torch.int8)}, ["stored as I8"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_computed_is_refused_with_a_reason(
    what: str, small: tuple[Any, Path, list[Path]], tmp_path: Path
) -> None:
    model, base, _ = small
    changes, tensors, words = REFUSED[what]
    save_adapter(model, tmp_path)
    config = read_config(base)
    load_adapter(tmp_path, config, torch.float32)
    rewrite(tmp_path, changes, tensors)
    with pytest.raises(ModelError) as caught:
        load_adapter(tmp_path, config, torch.float32)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_files_that_are_missing_torn_or_pickles_are_refused(
    small: tuple[Any, Path, list[Path]], tmp_path: Path
) -> None:
    model, base, _ = small
    config = read_config(base)
    with pytest.raises(ModelError, match=r"adapter_config\.json: cannot be read"):
        load_adapter(tmp_path, config, torch.float32)
    save_adapter(model, tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_adapter(tmp_path, config, torch.float32)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="never opened"):
        load_adapter(tmp_path, config, torch.float32)


def test_numbers_that_are_none_are_refused_by_name(small: tuple[Any, Path, list[Path]], tmp_path: Path) -> None:
    model, base, _ = small
    save_adapter(model, tmp_path)
    wrong = torch.ones(8, 64)
    wrong[3, 4] = torch.nan
    rewrite(tmp_path, {}, {f"{Q}.lora_A.weight": wrong})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight has numbers that are not"):
        decoder_of(base, [tmp_path], "fp32", "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_that_peft_saves_answer_as_peft_does(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: adapters are compared with merged weights alone")
    name, how = VARIANTS[variant]
    given = {"rank": 8, "alpha": 16, "targets": EVERY, **how}
    settings = {key: given[key] for key in ("use_rslora", "rank_pattern", "alpha_pattern") if key in given}
    model = save_model(name, tmp_path / "base")
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=given["rank"], lora_alpha=given["alpha"], target_modules=list(given["targets"]), lora_dropout=0.1,
            task_type="CAUSAL_LM", **settings,
        ),
    )  # fmt: skip
    with torch.no_grad():
        for path, weight in wrapped.named_parameters():
            if "lora_B" in path:
                weight.normal_(std=0.1)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    decoder = decoder_of(tmp_path / "base", [tmp_path / "adapter"], "fp32", "cpu")
    prompts = prompts_of(3)
    for prompt, (tokens, logits) in zip(prompts, answer(decoder, prompts, [0, 0, 0]), strict=True):
        expected, expected_logits = reference(wrapped, prompt, 8)
        assert tokens == expected
        torch.testing.assert_close(logits, expected_logits, atol=2e-3, rtol=1e-3)
