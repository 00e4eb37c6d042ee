"""What each token stands for: bytes for byte-level vocabularies, text or a byte for SentencePiece ones.

Knows the decoder rules of tokenizer.json that make decoding a matter of single tokens; it must not know files,
templates or how a decode is split over time. `Decoding.kind` says how tokens join:

    bytes    the tokens' bytes, one after the other, read as UTF-8
    pieces   texts and bytes; a run of bytes is read as UTF-8 as a whole, or becomes one U+FFFD a byte
    library  neither: only the tokenizer library can tell
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import tokenizers

from shoal.text.words import byte_letters


class Kind(Enum):
    """How a decoded text is made of its tokens."""

    BYTES = "bytes"
    PIECES = "pieces"
    LIBRARY = "library"


class Decoding:
    """The table of what tokens stand for, filled on demand."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.bytes_of_letter = {letter: b for b, letter in byte_letters().items()}
        rule = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self.strip = 0  # leading spaces that a decode drops
        self.replacements: list[tuple[str, str]] = []
        self.kind = self._read(rule)
        self._pieces: dict[int, str | int | bytes] = {}

    def _read(self, rule: Any) -> Kind:
        """Sort a decoder rule; fill `strip` and `replacements` for pieces."""
        parts = rule["decoders"] if rule and rule.get("type") == "Sequence" else [rule]
        if [part and part.get("type") for part in parts] in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return Kind.BYTES
        strip = 0
        replacements = []
        seen: list[str] = []
        for part in parts:
            match part:
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not seen:
                    replacements.append((old, new))
                case {"type": "ByteFallback" | "Fuse" as name}:
                    seen.append(name)
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if seen == ["ByteFallback", "Fuse"]:
                    strip = start
                    seen.append("Strip")
                case _:
                    return Kind.LIBRARY
        if seen[:2] != ["ByteFallback", "Fuse"]:
            return Kind.LIBRARY
        self.strip, self.replacements = strip, replacements
        return Kind.PIECES

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, a leading space included; b'' for an id outside the vocabulary."""
        piece = self.piece(token)
        if isinstance(piece, int):
            return bytes((piece,))
        return piece.encode() if isinstance(piece, str) else piece

    def piece(self, token: int) -> str | int | bytes:
        """A token as its decoder sees it: bytes (kind BYTES), a text, or an int for one byte (kind PIECES)."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._make(token)
        return found

    def _make(self, token: int) -> str | int | bytes:
        text = self.backend.id_to_token(token) if 0 <= token < 1 << 31 else None
        if self.kind is Kind.BYTES:
            letters = self.bytes_of_letter
            if text is None:
                return b""
            # A token with any letter outside the table is written as it stands, as the library's decoder does.
            return bytes([letters[c] for c in text]) if all(c in letters for c in text) else text.encode()
        if text is None:
            return ""
        if self.kind is Kind.LIBRARY:
            return str(self.backend.decode([token], skip_special_tokens=False))
        for old, new in self.replacements:
            text = text.replace(old, new)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return int(text[3:5], 16)
            except ValueError:
                return text
        return text
