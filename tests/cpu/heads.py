"""Small random classifiers as checkpoint folders, which transformers judges: decoders of bytes, encoders of words.

It must not know how Shoal reads a checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from byte_model import save_byte_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "null"))

from encoder_folder import write_pooling

SPECIAL = ["<pad>", "<cls>", "<sep>", "[UNK]"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(60))]
SMALL: Mapping[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 160, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 258, "attn_implementation": "eager",
}  # fmt: skip
DECODERS: Mapping[str, tuple[type, type]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForSequenceClassification),
    "mistral": (hf.MistralConfig, hf.MistralForSequenceClassification),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForSequenceClassification),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForSequenceClassification),
    "phi3": (hf.Phi3Config, hf.Phi3ForSequenceClassification),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForSequenceClassification),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3TextForSequenceClassification),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForSequenceClassification),
    "smollm3": (hf.SmolLM3Config, hf.SmolLM3ForSequenceClassification),
}
ENCODERS: Mapping[str, tuple[type, type]] = {
    "bert": (hf.BertConfig, hf.BertForSequenceClassification),
    "roberta": (hf.RobertaConfig, hf.RobertaForSequenceClassification),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForSequenceClassification),
}


def _save(model: Any, folder: Path, **changes: Any) -> Any:
    """Spread the model's numbers, save it, and change its config.json."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
            else:
                weight.normal_(std=0.3).add_(float("norm" in name.lower() and name.endswith("weight")))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def save_decoder(folder: Path, name: str = "qwen2", labels: int = 1, **changes: Any) -> Any:
    """A decoder's classifier over bytes. Returns the model."""
    save_byte_model(folder)
    torch.manual_seed(11)
    config, kind = DECODERS[name]
    model = kind(config(**SMALL, num_labels=labels, **({"head_dim": 16} if "gemma" in name else {}))).eval()
    return _save(model, folder, **changes)


def save_encoder(folder: Path, name: str = "bert", labels: int = 1, **changes: Any) -> Any:
    """An encoder's classifier over words, whose texts and pairs stand between ends as its family has it."""
    config, kind = ENCODERS[name]
    return _save_words(folder, name, config, kind, labels, **changes)


def save_embedder(folder: Path) -> Any:
    """An XLM-R that makes vectors, and no head over it."""
    model = _save_words(folder, "xlm-roberta", hf.XLMRobertaConfig, hf.XLMRobertaModel, 2)
    write_pooling(folder)
    return model


def _save_words(folder: Path, name: str, config: type, kind: type, labels: int, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(12)
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 60, "num_labels": labels, "pad_token_id": 0}
    if name == "xlm-roberta":
        sizes["type_vocab_size"] = 1
    words(name).save(str(folder / "tokenizer.json"))
    return _save(kind(config(**sizes)).eval(), folder, **changes)


def words(name: str) -> Tokenizer:
    """The tokenizer of an encoder."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    ends = [("<cls>", 1), ("<sep>", 2)]
    pair = "<cls> $A <sep> $B:1 <sep>:1" if name == "bert" else "<cls> $A <sep> <sep> $B <sep>"
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", pair=pair, special_tokens=ends)
    return tokenizer


@torch.inference_mode()
def logits(model: Any, ids: list[int], kinds: list[int] | None = None) -> list[float]:
    """What transformers makes of one prompt."""
    more = {} if kinds is None else {"token_type_ids": torch.tensor([kinds])}
    return model(torch.tensor([ids]), **more).logits[0].double().tolist()
