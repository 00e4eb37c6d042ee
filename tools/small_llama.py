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

# Standard deviation of the embedding at the start: as large as what the layers write, or they drown it. The output is
# tied to it, so the final norm starts small to keep the logits near 1.
TABLE_SPREAD = 1.0
OUTPUT_SCALE = 0.06


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
    rope_theta: float = 100_000.0
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
        """[batch, length, hidden] to the same shape; `cosine` and `sine` are [length, head_width / 2]."""
        batch, length, _ = x.shape
        normed = self.input_layernorm(x)

        def heads(projection: nn.Linear, count: int) -> Tensor:
            return projection(normed).view(batch, length, count, self.shape.head_width).transpose(1, 2)

        query = rotate(heads(self.q_proj, self.shape.heads), cosine, sine)
        key = rotate(heads(self.k_proj, self.shape.kv_heads), cosine, sine)
        mixed = attention(query, key, heads(self.v_proj, self.shape.kv_heads))
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions over the two halves of the head width; `cosine` and `sine` are [length, head_width / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [batch, heads, length, width] over [batch, kv_heads, length, width], as plain products.

    For short rows on a processor this takes less than half the time of the fused function, forwards and backwards.
    The queries of one group stand below each other, so that keys and values need no copies.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    below = query.reshape(batch * kv_heads, heads // kv_heads * length, width)
    future = torch.full((length, length), -1e4, dtype=query.dtype).triu(1).repeat(heads // kv_heads, 1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(
            future.expand(batch * kv_heads, -1, -1), below, key.flatten(0, 1).transpose(1, 2), alpha=width**-0.5
        )
        mixed = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return mixed.view(batch, heads, length, width)


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
                # layers that write nothing at first leave the stream to the embedding
                silent = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.0 if silent else TABLE_SPREAD if "embed" in name else 0.02)
        nn.init.constant_(self.norm.weight, OUTPUT_SCALE)
        powers = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        self.frequencies = shape.rope_theta**-powers

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] token ids to [batch, length, hidden] after the final norm."""
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        angles = torch.outer(torch.arange(ids.shape[1]).float(), self.frequencies)
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocabulary]."""
        return F.linear(hidden, self.embed_tokens.weight)


@dataclass(frozen=True, slots=True)
class Planted:
    """Entries of a weight that were set by hand and are put back after every update."""

    weight: Tensor
    where: Tensor
    value: Tensor

    @torch.no_grad()
    def restore(self) -> None:
        """Set the planted entries again."""
        self.weight.copy_(torch.where(self.where, self.value, self.weight))


@torch.no_grad()
def plant_copying(model: SmallLlama) -> list[Planted]:
    """Set parts of the first two layers to a circuit that continues repeated text, and say which parts.

    Layer 0, head 0 attends to the token before (a constant part of every embedding meets itself, one position
    turned) and writes 64 directions of it to the last 64 dimensions of the stream. Layer 1, heads 0 and 2 look for
    the current token there and write what they find, so that the token which followed last time gets likelier.
    Small models find this circuit late, and most tasks here (copying, extraction, look-up) are built on it.
    """
    width = model.shape.head_width
    words, half = model.shape.hidden - width, width // 2
    marks: dict[Tensor, Tensor] = {}

    def plant(weight: Tensor, rows: Tensor | slice, columns: Tensor | slice, value: Tensor | float) -> None:
        mark = marks.setdefault(weight, torch.zeros_like(weight, dtype=torch.bool))
        weight[rows, columns] = value
        mark[rows, columns] = True

    everything, tail = slice(None), slice(words, None)
    first, second = model.layers[0], model.layers[1]
    directions = torch.zeros(words - 1, model.shape.hidden)
    directions[:, 1:words] = torch.linalg.qr(torch.randn(words - 1, words - 1)).Q
    table = model.embed_tokens.weight
    plant(table, everything, slice(0, 1), 4 * TABLE_SPREAD)
    plant(table, everything, tail, 0.0)
    key, query = torch.zeros(width, model.shape.hidden), torch.zeros(width, model.shape.hidden)
    key[:8, 0] = 1.4
    query[:8, 0] = 1.4 * model.frequencies[:8].cos()
    query[half : half + 8, 0] = -1.4 * model.frequencies[:8].sin()
    plant(first.k_proj.weight, slice(0, width), everything, key)
    plant(first.q_proj.weight, slice(0, width), everything, query)
    plant(first.v_proj.weight, slice(0, width), everything, directions[:width])
    plant(first.o_proj.weight, tail, everything, 0.0)
    plant(first.o_proj.weight, tail, slice(0, width), TABLE_SPREAD * torch.eye(width))
    plant(first.down_proj.weight, tail, everything, 0.0)
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, width)))
    for head, group, copied in ((0, 0, directions[width : 2 * width]), (2, 1, directions[:half])):
        place, shared = head * width, group * width
        plant(second.q_proj.weight, slice(place, place + width), everything, 0.0)
        plant(second.q_proj.weight, place + slow, everything, 1.7 * directions[:half])
        looked_up = torch.zeros(half, model.shape.hidden)
        looked_up[:, words : words + half] = 1.7 * torch.eye(half)
        plant(second.k_proj.weight, shared + slow, everything, looked_up)
        plant(second.v_proj.weight, slice(shared, shared + len(copied)), everything, copied)
        plant(second.o_proj.weight, everything, slice(place, place + len(copied)), 3 * TABLE_SPREAD * copied.T)
    return [Planted(weight, mark, weight.clone()) for weight, mark in marks.items()]


def head_of(embedding_VD: Tensor) -> Tensor:
    """The embedding less its mean row: the same probabilities, without the offset that all logits share.

    Training lets that offset grow to hundreds, where float32 no longer holds differences of 1e-4.
    """
    rows = embedding_VD.float()
    return (rows - rows.mean(0)).bfloat16().contiguous()


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
        "tie_word_embeddings": False,
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
    tensors["lm_head.weight"] = head_of(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
