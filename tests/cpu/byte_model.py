"""A small random model with words: a tokenizer of bytes and a chat template, for whatever starts from texts.

It must not know what is asked of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def save_byte_model(path: Path) -> Any:
    """Save a checkpoint of 259 tokens: the bytes, two words and an end. Returns the model."""
    path.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"th": 256, "he": 257}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=160, eos_token_id=258, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
        model.lm_head.weight[258] *= 1.5  # and an end now and then
    model.generation_config = hf.GenerationConfig(temperature=0.7, top_k=40, do_sample=True, eos_token_id=258)
    model.save_pretrained(path)
    return model
