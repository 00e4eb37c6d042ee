"""One small random checkpoint per supported architecture, made by transformers, which also judges the answers.

It knows transformers' configuration classes. It must not know how Shoal reads what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf

COMMON: Mapping[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "rms_norm_eps": 1e-3, "attn_implementation": "eager",
}  # fmt: skip
WINDOW = 40  # crosses pages, and ends inside a tile of 256


def _config(cls: Callable[..., Any], **changes: Any) -> Any:
    return cls(**{**COMMON, **changes})


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


_SPREAD = [1.0 + i / 4 for i in range(8)]  # long-rope factors for heads of 16

CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: _config(hf.LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _config(hf.LlamaConfig, rope_parameters=_rope("linear", factor=3.0)),
    "llama3": lambda: _config(
        hf.LlamaConfig,
        rope_parameters=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
        ),
    ),
    "llama-yarn": lambda: _config(
        hf.LlamaConfig, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=256)
    ),
    "llama-dynamic": lambda: _config(hf.LlamaConfig, rope_parameters=_rope("dynamic", factor=2.0)),
    "smollm": lambda: _config(hf.LlamaConfig, tie_word_embeddings=True, num_attention_heads=6, hidden_size=96),
    "mistral": lambda: _config(hf.MistralConfig, sliding_window=WINDOW, head_dim=32),
    "qwen2": lambda: _config(hf.Qwen2Config, tie_word_embeddings=True),
    "qwen2-window": lambda: _config(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: _config(hf.Qwen3Config, head_dim=32),
    "phi3": lambda: _config(hf.Phi3Config, sliding_window=WINDOW),
    "phi3-long": lambda: _config(
        hf.Phi3Config,
        original_max_position_embeddings=512,
        rope_parameters=_rope("longrope", short_factor=_SPREAD, long_factor=[2 * x for x in _SPREAD]),
    ),
    "gemma2": lambda: _config(
        hf.Gemma2Config, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=24, num_hidden_layers=4
    ),
    "gemma3": lambda: _config(
        hf.Gemma3TextConfig, head_dim=16, sliding_window=WINDOW, num_hidden_layers=7, query_pre_attn_scalar=20
    ),
    "olmo2": lambda: _config(hf.Olmo2Config),
    "granite": lambda: _config(
        hf.GraniteConfig, embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "smollm3": lambda: _config(hf.SmolLM3Config, no_rope_layer_interval=2),
}  # fmt: skip
"""Every listed architecture, some with their variants."""


def make_model(name: str, seed: int = 0) -> Any:
    """The transformers model, in float32 with eager attention, its logits spread so that ties are improbable."""
    config = CONFIGS[name]()
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    offset = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path == "model.norm.weight":
                # Of both signs: with tied embeddings a positive one would make every token predict itself.
                weight.normal_().add_(offset - 1.0)
            elif weight.ndim == 1 and path.endswith("norm.weight"):
                weight.uniform_(-0.4, 0.4).add_(offset)
            elif weight.ndim == 1:
                weight.normal_(std=0.3)
            elif "embed" in path:
                weight.normal_(std=3 / math.sqrt(weight.shape[1]) if config.tie_word_embeddings else 1.0)
            else:
                weight.normal_(std=(3.0 if "lm_head" in path else 1.0) / math.sqrt(weight.shape[1]))
        if name == "granite":
            model.lm_head.weight *= 4
    model.generation_config = hf.GenerationConfig()
    return model


def save_model(name: str, folder: Path, seed: int = 0) -> Any:
    """Save the model as a checkpoint folder and return it."""
    model = make_model(name, seed)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def reference(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers' own generate, and the logits [num_tokens, V] they were chosen from."""
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
