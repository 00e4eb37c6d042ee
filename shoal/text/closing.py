"""The way to the end of an unfinished text: tokens after which it may stop, few of them where that can be told.

Knows how JSON closes and what a matcher allows; it must not know rows, limits or how tokens are chosen otherwise.
The library does not say how far the end is. So it is walked to, by a copy of the matcher: in JSON by the sign that
closes most, elsewhere by what has only just become possible. That finds a way, not always the shortest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bits = npt.NDArray[np.int32]

_OUTSIDE = b'}],:0123456789"[{tfn-.eE'  # signs of JSON outside its strings, what closes most first
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each token stands for, and which tokens end an answer."""

    tokens: list[bytes]  # by id, as many as the model has logits; b"" where there is no word
    special: frozenset[int]  # those that stand for no text
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The first `size` tokens of a tokenizer."""
        special = frozenset(i for i in tokenizer.special_ids | tokenizer.eos if i < size)
        # A byte that no text has keeps special tokens out of texts that only look like them.
        tokens = [b"\xff" * (i in special) + tokenizer.token_bytes(i) for i in range(size)]
        return cls(tokens, special, tuple(sorted(i for i in tokenizer.eos if i < size)))

    def bits(self, tokens: Sequence[int]) -> Bits:
        """A mask that allows these tokens alone."""
        mask = np.zeros((len(self.tokens) + 31) // 32, dtype=np.uint32)
        for token in tokens:
            mask[token >> 5] |= np.uint32(1 << (token & 31))
        return mask.view(np.int32)

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens in a row."""
        return b"".join([self.tokens[token] for token in tokens])


class Closer:
    """Finds ways to the end of texts in one vocabulary. One thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        single = {word: i for i, word in reversed(list(enumerate(vocabulary.tokens))) if len(word) == 1}
        self._outside = [single[bytes([sign])] for sign in _OUTSIDE if bytes([sign]) in single]
        self._quote = single.get(b'"', -1)
        self._length = np.array([len(word) for word in vocabulary.tokens])
        self._length[list(vocabulary.special)] = 0
        self._first = np.array([word[0] if word else 0 for word in vocabulary.tokens])
        self._wordy = np.array([word[:1].isalnum() for word in vocabulary.tokens])
        self._mask = vocabulary.bits(())
        self._bytes = self._mask.data.cast("B")
        self._address = self._mask.ctypes.data

    def way(self, matcher: LLMatcher, json: bool, produced: Sequence[int], most: int) -> list[int] | None:
        """At most so many tokens after which the text may end; None when no such way was found.

        `matcher` stands after the tokens produced, and stays there. [] when the text may end here.
        """
        matcher, way = matcher.deep_copy(), list[int]()
        inside, escaped, _ = follow(self._vocabulary.text(produced)) if json else (False, False, 0)
        before: Bits | None = None  # what was possible one token ago in the same string
        used = np.zeros(256, dtype=np.int64)  # how often a token with that first byte was taken in the same string
        while not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
            if self._may_end():
                return way
            if len(way) >= most:
                return None
            token = self._next(json, inside, before, used)
            if token < 0 or not matcher.consume_token(token):
                return None
            before = self._mask.copy()
            used[self._first[token]] += 1
            here = [token, *matcher.compute_ff_tokens()]
            if len(here) > 1 and matcher.try_consume_tokens(here[1:]) != len(here) - 1:
                return None
            way += here
            if json:
                was = inside
                inside, escaped, _ = follow(self._vocabulary.text(here), inside, escaped)
                if inside is not was:
                    before = None
                    used[:] = 0
        return None

    def again(self, matcher: LLMatcher, way: list[int]) -> list[int] | None:
        """As much of a way found earlier as leads to an end from here: all of it in the same string, its last part
        when what it began with has been written since. None when nothing does. It costs a tenth of finding a way."""
        for first in range(len(way) + 1):
            ahead = [*way[first:], self._vocabulary.ends[0]]
            if matcher.validate_tokens(ahead) == len(ahead):
                return way[first:]
        return None

    def _allowed(self, token: int) -> bool:
        return bool(self._bytes[token >> 3] >> (token & 7) & 1)

    def _may_end(self) -> bool:
        return any(self._allowed(end) for end in self._vocabulary.ends)

    def _next(self, json: bool, inside: bool, before: Bits | None, used: npt.NDArray[np.int64]) -> int:
        """The token that leads on, -1 if there is none: what has just become possible, else what was tried least."""
        if inside:
            if self._quote >= 0 and self._allowed(self._quote):
                return self._quote
        elif json:
            for token in self._outside:
                if self._allowed(token):
                    return token
        masks = [self._mask] if before is None else [self._mask & ~before, self._mask]
        for mask in masks:
            ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(self._length)])
            if len(ids):
                # Longer ones go further; behind a word, a pattern waits for a sign more often than for another word.
                price = 1000 * used[self._first[ids]] + (500 * self._wordy[ids] if used.any() else 0)
                return int(ids[(self._length[ids] - price).argmax()])
        return -1


def follow(text: bytes, inside: bool = False, escaped: bool = False) -> tuple[bool, bool, int]:
    """Whether JSON text ends inside a string, and there behind a backslash that speaks of the next character; and how
    many strings have begun or ended."""
    rest = _ESCAPED.sub(b"", b"\\" * escaped + text)
    quotes = rest.count(b'"')
    return inside ^ bool(quotes & 1), rest.endswith(b"\\"), quotes
