"""The small files of an encoder's checkpoint, without weights: enough to read rows, plan and answer them.

It must not know how any of them is read.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

FLAGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
WORDS = ["[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
UNKNOWN, BEGIN, END = 0, 1, 2
CONTEXT, WIDTH = 24, 48


def write_pooling(folder: Path, kind: str = "mean", normalize: bool = True, **limits: object) -> None:
    """The files of sentence-transformers beside a checkpoint."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: name == kind for name, flag in FLAGS.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    if limits:
        (folder / "sentence_bert_config.json").write_text(json.dumps(limits))


def write_encoder(folder: Path) -> Path:
    """A folder whose tokens are words between two ends, for texts of up to CONTEXT tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "bert", "hidden_size": WIDTH, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    write_pooling(folder, max_seq_length=CONTEXT)
    return folder
