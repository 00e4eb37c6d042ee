"""Configuration files of published checkpoints, as they were uploaded, mean to us what they mean to transformers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers

from shoal.nn.arch import make_config
from shoal.nn.weights import expected_shapes, plain_name

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}  # fmt: skip
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def entry(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    """D, inner, layers, heads, key heads, vocabulary and context come as `sizes`."""
    sizes = values.pop("sizes")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "max_position_embeddings")  # fmt: skip
    common = {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", "use_cache": True}
    return {**common, **dict(zip(names, sizes, strict=True)), **values}


PUBLISHED = {
    "Llama-2-7b": entry(
        "LlamaForCausalLM", "llama", sizes=(4096, 11008, 32, 32, 32, 32000, 4096), hidden_act="silu",
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, pretraining_tp=1,
    ),
    "Llama-3.2-1B": entry(
        "LlamaForCausalLM", "llama", sizes=(2048, 8192, 16, 32, 8, 128256, 131072), hidden_act="silu", head_dim=64,
        rms_norm_eps=1e-5, rope_scaling=LLAMA3, rope_theta=500000.0, tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False,
    ),
    "SmolLM2-135M": entry(
        "LlamaForCausalLM", "llama", sizes=(576, 1536, 30, 9, 3, 49152, 8192), hidden_act="silu", rms_norm_eps=1e-5,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
    ),
    "Mistral-7B-v0.1": entry(
        "MistralForCausalLM", "mistral", sizes=(4096, 14336, 32, 32, 8, 32000, 32768), hidden_act="silu",
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.3": entry(
        "MistralForCausalLM", "mistral", sizes=(4096, 14336, 32, 32, 8, 32768, 32768), hidden_act="silu",
        rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, tie_word_embeddings=False,
    ),
    "Qwen2.5-0.5B": entry(
        "Qwen2ForCausalLM", "qwen2", sizes=(896, 4864, 24, 14, 2, 151936, 32768), hidden_act="silu",
        max_window_layers=24, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=32768, tie_word_embeddings=True,
        use_sliding_window=False, use_mrope=False,
    ),
    "Qwen3-0.6B": entry(
        "Qwen3ForCausalLM", "qwen3", sizes=(1024, 3072, 28, 16, 8, 151936, 40960), hidden_act="silu", head_dim=128,
        attention_bias=False, max_window_layers=28, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
    ),
    "Phi-3-mini-4k": entry(
        "Phi3ForCausalLM", "phi3", sizes=(3072, 8192, 32, 32, 32, 32064, 4096), hidden_act="silu", rms_norm_eps=1e-5,
        original_max_position_embeddings=4096, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
        attention_bias=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    ),
    "Phi-3.5-mini": entry(
        "Phi3ForCausalLM", "phi3", sizes=(3072, 8192, 32, 32, 32, 32064, 131072), hidden_act="silu",
        rms_norm_eps=1e-5, original_max_position_embeddings=4096, rope_scaling=LONG, rope_theta=10000.0,
        sliding_window=262144, tie_word_embeddings=False,
    ),
    "Phi-4-mini": entry(
        "Phi3ForCausalLM", "phi3", sizes=(3072, 8192, 32, 24, 8, 200064, 131072), hidden_act="silu",
        rms_norm_eps=1e-5, original_max_position_embeddings=4096, partial_rotary_factor=0.75, rope_scaling=LONG,
        rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
    ),
    "gemma-2-2b": entry(
        "Gemma2ForCausalLM", "gemma2", sizes=(2304, 9216, 26, 8, 4, 256000, 8192), attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=4096,
    ),
    "gemma-3-1b": entry(
        "Gemma3ForCausalLM", "gemma3_text", sizes=(1152, 6912, 26, 4, 1, 262144, 32768), attn_logit_softcapping=None,
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6,
    ),
    "OLMo-2-1124-7B": entry(
        "Olmo2ForCausalLM", "olmo2", sizes=(4096, 11008, 32, 32, 32, 100352, 4096), hidden_act="silu",
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, attention_bias=False,
    ),
    "granite-3.1-2b": entry(
        "GraniteForCausalLM", "granite", sizes=(2048, 8192, 40, 32, 8, 49155, 131072), hidden_act="silu",
        attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
        rms_norm_eps=1e-5, rope_theta=5000000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    ),
    "SmolLM3-3B": entry(
        "SmolLM3ForCausalLM", "smollm3", sizes=(2048, 11008, 36, 16, 4, 128256, 65536), hidden_act="silu",
        no_rope_layer_interval=4, no_rope_layers=[int((i + 1) % 4 != 0) for i in range(36)], rms_norm_eps=1e-6,
        rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, layer_types=["full_attention"] * 36,
    ),
}  # fmt: skip
"""Written down from the files that were uploaded; long lists of factors shortened to one repeated number."""


@pytest.fixture
def theirs(request: pytest.FixtureRequest) -> Any:
    config = transformers.AutoConfig.for_model(**deepcopy(PUBLISHED[request.param]))  # it changes what it is given
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("name", "theirs"), [(name, name) for name in PUBLISHED], indirect=["theirs"])
def test_a_published_configuration_means_what_transformers_takes_it_for(name: str, theirs: Any) -> None:
    ours = make_config(PUBLISHED[name])
    shapes = {plain_name(path): tuple(tensor.shape) for path, tensor in theirs.state_dict().items()}
    if ours.tied:
        shapes.pop("lm_head.weight", None)
    assert expected_shapes(ours) == shapes
    assert ours.tied == theirs.config.tie_word_embeddings
    for index, layer in enumerate(theirs.model.layers):
        attention = layer.self_attn
        assert attention.scaling == pytest.approx(ours.attention_scale)
        window = getattr(attention, "sliding_window", None) or 0
        if name.startswith(("Mistral", "Phi")):
            window = theirs.config.sliding_window or 0
        assert ours.layers[index].window == window
        assert (ours.layers[index].rope is not None) == bool(getattr(attention, "use_rope", True))
    norm = theirs.model.norm
    assert ours.norm_eps == getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    assert ours.context == theirs.config.max_position_embeddings
    check_ropes(name, theirs)


def check_ropes(name: str, theirs: Any) -> None:
    """Frequencies agree at the length that transformers begins with."""
    module = type(theirs.model.rotary_emb)(theirs.config)
    ours = make_config(PUBLISHED[name], getattr(theirs.config, "original_max_position_embeddings", None)).ropes
    if name.startswith("gemma-3"):
        expected = [(module.full_attention_inv_freq, 1.0), (module.sliding_attention_inv_freq, 1.0)]
    else:
        expected = [(module.inv_freq, module.attention_scaling)]
    for rope, (frequencies, scale) in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.tensor(rope.frequencies), frequencies, rtol=2e-7, atol=0)
        assert rope.scale == pytest.approx(scale)
