"""A small Llama in plain torch for training, and its export; it knows tensors and file names, and nothing of data.

The layers compute what `LlamaForCausalLM` of transformers computes: pre-norm blocks, rotary positions over halves,
grouped key and value heads, a gated SiLU feed-forward, and an output matrix tied to the embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model; `context` is declared, not what training covered."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    context: int = 8192
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape, computed in float32."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight).to(x.dtype)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.input_layernorm = RootMeanSquareNorm(shape.hidden, shape.epsilon)
        self.post_attention_layernorm = RootMeanSquareNorm(shape.hidden, shape.epsilon)
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.v_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[batch, length, hidden] to the same shape; `cosine` and `sine` are [length, head_width]."""
        batch, length, _ = x.shape
        normed = self.input_layernorm(x)

        def heads(projection: nn.Linear, count: int) -> Tensor:
            return projection(normed).view(batch, length, count, self.shape.head_width).transpose(1, 2)

        group = self.shape.heads // self.shape.kv_heads
        query = rotate(heads(self.q_proj, self.shape.heads), cosine, sine)
        key = rotate(heads(self.k_proj, self.shape.kv_heads), cosine, sine).repeat_interleave(group, 1)
        value = heads(self.v_proj, self.shape.kv_heads).repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions over the two halves of the head width."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class SmallLlama(nn.Module):
    """Embedding, layers, final norm; `logits` multiplies with the tied embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RootMeanSquareNorm(shape.hidden, shape.epsilon)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if small else 0.02)
        powers = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        self.frequencies = shape.rope_theta**-powers

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] token ids to [batch, length, hidden] after the final norm."""
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        angles = torch.outer(torch.arange(ids.shape[1]).float(), self.frequencies).repeat(1, 2)
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocabulary]."""
        return F.linear(hidden, self.embed_tokens.weight)


def export(model: SmallLlama, folder: Path, stop_ids: list[int]) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) in the Llama layout."""
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": stop_ids,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": stop_ids, "pad_token_id": 0, "do_sample": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {}
    for name, weight in model.named_parameters():
        for block, parts in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for part in parts:
                name = name.replace(f".{part}_proj.", f".{block}.{part}_proj.")
        tensors[f"model.{name}"] = weight.detach().bfloat16().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
