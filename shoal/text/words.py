"""A fast path for byte-level BPE over plain western text: split into words once, remember each word's tokens.

Knows the word-splitting patterns of the common tokenizers, restated for a character range where Python's `re` and the
tokenizer library agree; it must not know files or templates. Whatever it is not certain of, it leaves to the library.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Any

import tokenizers

from shoal.core.types import TOKEN, Tokens

# Characters that NFC leaves alone and whose letter, number and space classes never changed between Unicode versions:
# ASCII, Latin-1, Latin Extended-A without its last letter (the long s folds to "s"), dashes, quotes, bullets, the
# ellipsis, the euro, trade-mark and minus signs.
_SAFE = re.compile("[\x00-\u017e\u2010-\u2027\u2030-\u205e\u20ac\u2122\u2212]*")
_LETTER = "A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u017e"
_NUMBER = "0-9\xb2\xb3\xb9\xbc-\xbe"
_SPACE = "\t-\r \x85\xa0"

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2; GPT-2 with single digits, as the embedded model; Qwen 2 and 3; Llama 3 and OLMo 2. All cover every character.
PATTERNS = (GPT2_PATTERN, _DIGITS, _CL100K % r"\p{N}", _CL100K % r"\p{N}{1,3}")

MAX_WORDS = 1 << 17  # remembered words, about 30 MB
MAX_SEGMENTS = 1 << 12  # remembered whole segments: the fixed parts of chat templates come first and stay
LONG_WORD = 64  # characters; longer words are not remembered
LONG_SEGMENT = 4096


def byte_letters() -> dict[int, str]:
    """The printable letter by which byte-level vocabularies write each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The Python form of a word-splitting pattern, right for texts of safe characters only."""
    for old, new in ((r"\p{L}", _LETTER), (r"\p{N}", _NUMBER), (r"\s", _SPACE)):
        inside_class = re.compile(r"(\[[^\]]*?)" + re.escape(old))
        pattern = inside_class.sub(rf"\g<1>{new}", pattern).replace(old, f"[{new}]")
    return re.compile(pattern.replace(r"\S", f"[^{_SPACE}]"))


class _Words(dict[str, tuple[int, ...]]):
    """Tokens of each word seen, filled on demand. Emptied when full: what it answers never depends on its content."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        letters = byte_letters()
        self.letters = [letters[b] for b in range(256)]

    def __missing__(self, word: str) -> tuple[int, ...]:
        spelled = "".join([self.letters[b] for b in word.encode()])
        ids = tuple([token.id for token in self.model.tokenize(spelled)])
        if len(word) <= LONG_WORD:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordEncoder:
    """Encodes texts of safe characters exactly as the library would, without post-processing."""

    def __init__(self, backend: tokenizers.Tokenizer, pattern: re.Pattern[str], added: dict[str, int]) -> None:
        self.words = _Words(backend.model)
        self.findall = pattern.findall
        self.added = added
        self.segments: dict[str, Tokens] = {}
        longest_first = sorted(added, key=lambda text: (-len(text), text))
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split if added else None

    def encode(self, text: str) -> Tokens | None:
        """The tokens of a text, or None when the text has a character outside the safe range."""
        if not text.isascii() and not _SAFE.fullmatch(text):
            return None
        if self.split is None:
            return self._segment(text)
        parts = self.split(text)
        if len(parts) == 1:
            return self._segment(text)
        segments = self.segments
        out = array(TOKEN)
        for part in parts:
            if part:
                ids = segments.get(part)
                out += ids if ids is not None else self._remember(part)
        return out

    def _segment(self, text: str) -> Tokens:
        """The tokens of a text without added tokens."""
        return array(TOKEN, chain.from_iterable(map(self.words.__getitem__, self.findall(text))))

    def _remember(self, text: str) -> Tokens:
        """The tokens of a text between added tokens, or of one added token."""
        ids = array(TOKEN, (self.added[text],)) if text in self.added else self._segment(text)
        if len(self.segments) < MAX_SEGMENTS and len(text) <= LONG_SEGMENT:
            self.segments[text] = ids
        return ids


def word_encoder(backend: tokenizers.Tokenizer) -> WordEncoder | None:
    """The fast path for this tokenizer, or None where any of its parts is not known to be safe."""
    tokens = list(backend.get_added_tokens_decoder().items())
    if backend.encode_special_tokens or any(t.lstrip or t.rstrip or t.single_word or not t.content for _, t in tokens):
        return None
    rules = _rules(backend)
    if rules["normalizer"] not in (None, {"type": "NFC"}) or not _plain_bpe(rules["model"]):
        return None
    if len({t.normalized for _, t in tokens}) > 1:
        return None  # two passes over the text, whose overlaps one pass cannot reproduce
    pattern = _split_pattern(rules["pre_tokenizer"])
    if pattern not in PATTERNS:
        return None
    return WordEncoder(backend, compile_pattern(pattern), {t.content: token_id for token_id, t in tokens})


def _rules(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The parts of a tokenizer as JSON, its vocabulary left out."""
    text = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    rules: dict[str, Any] = {name: json.loads(part.__getstate__()) if part else None for name, part in text.items()}
    model = backend.model
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    rules["model"] = {name: getattr(model, name, None) for name in names} if type(model).__name__ == "BPE" else None
    return rules


def _plain_bpe(model: dict[str, Any] | None) -> bool:
    return model is not None and not any(model.values())


def _split_pattern(rule: Any) -> str:
    """The pattern by which a pre-tokenizer finds words before it spells them in bytes; '' for any other kind."""
    parts: Iterable[Any] = rule["pretokenizers"] if rule and rule.get("type") == "Sequence" else [rule]
    match list(parts):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return str(pattern)
    return ""
