"""Tokenizers for tests: the package's own, small ones made here, and those of the shared data where it is present."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from shoal.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
MINNOW = ROOT / "shoal" / "models" / "minnow"
FOLDERS = {
    "minnow": MINNOW,
    "gpt2": SHARED / "tokenizers" / "gpt2",
    "qwen2": SHARED / "tokenizers" / "qwen2",
    "gpt_neox_20b": SHARED / "tokenizers" / "gpt_neox_20b",
    "stories260K": SHARED / "models" / "stories260K" / "hf",
}


@cache
def load(name: str) -> Tokenizer:
    """A tokenizer by name; skips the test when the shared data is not there."""
    folder = FOLDERS[name]
    if not folder.is_dir():
        pytest.skip(f"needs {folder.relative_to(ROOT.parent)}, which is not beside this repository")
    return Tokenizer.load(folder)


def write_sentencepiece(folder: Path, gemma: bool = False) -> Path:
    """A tokenizer.json in the manner of Llama 2 (or Gemma): pieces with ▁, byte tokens, a stripped first space."""
    special = ["<unk>", "<s>", "</s>", "<|user|>"]
    letters = ["▁", "a", "b", "c", "é", "日", "\n\n"]
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), *letters, "▁a", "bc", "▁▁", "abc"]
    merges = [["▁", "a"], ["b", "c"], ["▁", "▁"], ["a", "bc"]]
    strip = [] if gemma else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    rule = {
        "version": "1.0",
        "added_tokens": [_added(i, text) for i, text in enumerate(special)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([] if gemma else [{"type": "Prepend", "prepend": "▁"}]), replace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(rule), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_metaspace(folder: Path) -> Path:
    """A tokenizer.json whose decoder only the library understands."""
    vocab = [["<unk>", 0.0], *([piece, -1.0 - i] for i, piece in enumerate(["▁", "a", "b", "▁a", "ab", "é", "日"]))]
    rule = {
        "version": "1.0",
        "added_tokens": [_added(0, "<unk>")],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rule), encoding="utf-8")
    return folder


def _added(token: int, text: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": True}
