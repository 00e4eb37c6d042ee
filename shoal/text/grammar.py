"""Masks over a vocabulary: which tokens may come next, so that an answer's text is what its constraint asks.

Knows the grammar library, the bytes of tokens and what a row has produced; it must not know logits, steps or requests'
other wishes. A row's masks are a function of its constraint, its limit and its own tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.core.errors import ModelError, RowError
from shoal.core.types import Constraint
from shoal.text.closing import Closer, Vocabulary, follow
from shoal.text.constraint import library_grammar, limits, refusal
from shoal.text.decoding import Kind
from shoal.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

KEPT = 128  # compiled constraints kept for rows to come; 140 kB each for a schema of 500 bytes
KEPT_TEXT = 1 << 20  # characters of those together: what is compiled grows with what was written

ASKED = 4096  # texts whose tokens are remembered

Bits = npt.NDArray[np.int32]
_Room = tuple[Bits, int]  # memory for a mask, and where it begins


JSON_KINDS = frozenset(("json", "calls"))  # constraints on texts that are mostly JSON
MARGIN = 16  # tokens kept for what may still be opened between two looks at how far the end is
WAY = 4096  # tokens to an end that is looked for: further ones are not found
PATIENCE = 15  # a row whose tokens are refused again and again has fewer masks than that between two trials
LARGE = 1 << 15  # tokens of a vocabulary whose masks are worth a thread: those of a smaller one cost less than that


@dataclass(slots=True)
class Matching:
    """One row under its constraint. Changed by `Grammars` alone."""

    limit: int  # tokens it may produce
    stop: frozenset[int]  # tokens that end it
    json: bool
    endless: bool  # it ignores the end
    jumps: bool = False  # it takes tokens that alone may come by itself
    tries: bool = False  # it is asked whether a token may come, before it makes a mask
    matcher: LLMatcher | None = None
    problem: str = ""  # why it cannot go on
    bits: Bits | None = None  # int32 [W], tokens that may come next by bit; None when nothing will, or it is open
    open: bool = False  # a token may come next, and which ones has not been made out
    taken: bool = False  # the matcher has taken the next token already
    forced: list[int] = field(default_factory=list)  # tokens it has taken by itself, for the caller to use and forget
    tokens: list[int] = field(default_factory=list)
    look_at: int = 0  # when it has so many tokens, see how far the end is
    way: list[int] | None = None  # the way to its end that was found last
    seen: int = 0  # tokens it had at the last look, and whether its text was
    inside: bool = False  # in a string of JSON then, and
    escaped: bool = False  # behind a backslash
    ending: list[int] | None = None  # the tokens it has to take to its end, the next one last
    refused: int = 0  # grows with every token that was tried in vain since one was not
    masked: int = 0  # masks it makes before a token is tried again, so that they are made beside the model

    @property
    def quick(self) -> bool:
        """Whether it will need no mask to know what may come next."""
        return self.tries and not self.masked


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A constraint's matcher before the first token, and a way to the end from there."""

    matcher: LLMatcher
    way: list[int] | None


class Grammars:
    """Compiles constraints for one vocabulary and follows rows through them. Rows share what is compiled.

    Rows may begin in one thread while others go on in another.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Takes a moment for large vocabularies. ModelError when masks cannot be made for this tokenizer."""
        from llguidance import LLTokenizer, TokenizerWrapper

        if tokenizer.decoding.kind is Kind.LIBRARY:
            raise ModelError("this model's tokenizer does not say which bytes its tokens stand for")
        self.vocabulary = vocabulary = Vocabulary.of(tokenizer, vocab_size)
        if not vocabulary.ends:
            raise ModelError("this model names no token that ends an answer")
        self._words = LLTokenizer(TokenizerWrapper(_Words(tokenizer, vocabulary)), eos_token=list(vocabulary.ends))
        self._limits = limits()
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._of_begin, self._of_advance = Closer(vocabulary), Closer(vocabulary)
        self._end = vocabulary.bits(vocabulary.ends)
        silent = vocabulary.special.union(vocabulary.ends)
        self._patience = PATIENCE if vocab_size >= LARGE else 1
        self._spelled = [bool(word) and i not in silent for i, word in enumerate(vocabulary.tokens)]

    def begin(
        self, constraint: Constraint, stop: frozenset[int], limit: int, produced: Sequence[int], jumps: bool = False,
        tries: bool = False,
    ) -> Matching:  # fmt: skip
        """A row that has produced those tokens. One that cannot be followed has a problem, and never a mask.

        One that jumps goes on by itself as long as a mask has one token: what it takes is what it would have been
        given, a token at a time. One that tries is open where it can be: it has a mask after `accept` said no.
        """
        endless = stop.isdisjoint(self.vocabulary.ends)
        row = Matching(limit, stop, constraint.kind in JSON_KINDS, endless, jumps, tries)
        try:
            compiled = self._compile(constraint)
        except RowError as error:
            row.problem = str(error)
            return row
        row.matcher, row.way = compiled.matcher.deep_copy(), compiled.way
        self._look(row, row.way)
        for token in produced:
            self._take(row, token, self._of_begin)
        self._go_on(row, None, self._of_begin)
        return row

    def advance(self, rows: Sequence[tuple[Matching, int]]) -> None:
        """Each row has produced that token: its bits become those of the next.

        Row by row, so that a parser is in the cache when it is asked: the library's own threads take twice as long.
        """
        room_KW = np.empty((len(rows), len(self._end)), dtype=np.int32)
        address, size = room_KW.ctypes.data, self._end.nbytes
        for k, (row, token) in enumerate(rows):
            if row.bits is None or row.problem:
                continue
            self._take(row, token, self._of_advance)
            self._go_on(row, (room_KW[k], address + k * size), self._of_advance)

    def accept(self, rows: Sequence[tuple[Matching, int]]) -> list[bool]:
        """Whether each row, which is open, may take that token, as its mask would say. One that may has produced it;
        one that may not has bits.

        Tokens that stand for no text are left to masks: the end is not the matcher's alone.
        """
        found = []
        for row, token in rows:
            matcher = row.matcher
            assert matcher is not None
            if token >= 0 and self._spelled[token] and token not in row.stop and matcher.try_consume_tokens([token]):
                found.append(True)
                row.refused = 0
                length = len(row.tokens) + 1
                if length < row.look_at and length < row.limit and not matcher.is_stopped():
                    if not matcher.compute_ff_tokens():
                        row.tokens.append(token)  # it is open again: so for nine of ten tokens
                        continue
                row.taken = True
                self._take(row, token, self._of_advance)
                self._go_on(row, None, self._of_advance)
            else:
                found.append(False)
                row.open, row.refused = False, min(2 * row.refused + 1, self._patience)
                row.masked = row.refused - 1
                self._mask(row, None)
        return found

    def _compile(self, constraint: Constraint) -> _Compiled:
        from llguidance import LLMatcher

        found = self._compiled.get(constraint)
        if found is None:
            matcher = LLMatcher(self._words, library_grammar(constraint), log_level=0, limits=self._limits)
            way = self._of_begin.way(matcher, constraint.kind in JSON_KINDS, (), WAY)  # looks at the first mask too
            if matcher.is_error():
                raise refusal(constraint.kind, matcher.get_error())
            found = self._compiled[constraint] = _Compiled(matcher, way)
            size = sum(len(each.text) for each in self._compiled)
            while len(self._compiled) > 1 and (len(self._compiled) > KEPT or size > KEPT_TEXT):
                size -= len(self._compiled.popitem(last=False)[0].text)
        self._compiled.move_to_end(constraint)
        return found

    def _take(self, row: Matching, token: int, closer: Closer) -> None:
        """Follow a row by one token."""
        row.tokens.append(token)
        if row.ending is not None:
            row.ending = row.ending[:-1]
        elif token not in row.stop:
            assert row.matcher is not None
            if not row.taken:
                row.matcher.consume_token(token)
            if len(row.tokens) >= row.look_at:
                if not self._stays(row) or _spare(row, row.way or []) < _hurry(row):
                    most = min(WAY, row.limit - len(row.tokens))
                    known = closer.again(row.matcher, row.way) if row.way is not None else None
                    row.way = closer.way(row.matcher, row.json, row.tokens, most) if known is None else known
                self._look(row, row.way)

    def _stays(self, row: Matching) -> bool:
        """Whether a row of JSON is where it was at the last look: in the same string, or between the same words. Then
        the way to its end is as long as it was, but for strings that must have some length."""
        text = self.vocabulary.text(row.tokens[row.seen :])
        row.seen, before = len(row.tokens), row.inside
        row.inside, row.escaped, quotes = follow(text, row.inside, row.escaped)
        return row.json and row.way is not None and not quotes and (before or text.isspace())

    def _go_on(self, row: Matching, room: _Room | None, closer: Closer) -> None:
        """Find out what may come next; a row that jumps first takes the tokens it has no choice about."""
        row.taken = False
        while (token := self._fill(row, room)) >= 0 and row.jumps:
            row.forced.append(token)
            self._take(row, token, closer)

    def _look(self, row: Matching, way: list[int] | None) -> None:
        """Lead the row to its end when there is just room for it; else say when to look again.

        What is done depends on the row alone: one that begins again behind some tokens looks at the same places.
        """
        left = row.limit - len(row.tokens)
        if way is None or len(way) >= left:
            row.look_at = len(row.tokens) + max(16, left // 4)
            return
        spare = _spare(row, way)
        if spare < _hurry(row):
            row.ending = way[::-1]
        row.look_at = len(row.tokens) + spare // 5

    def _fill(self, row: Matching, room: _Room | None) -> int:
        """Open the row or make the bits of its next token, in that memory where they are its own.

        Gives the token that alone may come, if that is known, and -1 else. A row that jumps has no bits for such a one.
        """
        row.bits, row.open = None, False
        if len(row.tokens) >= row.limit or (row.tokens and row.tokens[-1] in row.stop):
            return -1
        if row.ending is not None:
            row.bits = self.vocabulary.bits(row.ending[-1:]) if row.ending else self._end
        else:
            assert row.matcher is not None
            if not row.matcher.is_stopped():
                forced = row.matcher.compute_ff_tokens()
                if forced:  # a mask would have the first of them alone
                    row.bits = None if row.jumps else self.vocabulary.bits(forced[:1])
                    return int(forced[0])
                if row.tries and not row.masked:
                    row.open = True
                    return -1
            row.masked = max(0, row.masked - 1)
            self._mask(row, room)
        return _only(row.bits) if row.jumps and row.bits is not None else -1

    def _mask(self, row: Matching, room: _Room | None) -> None:
        """What the matcher lets come next, as bits in that memory."""
        assert row.matcher is not None
        if room is None:
            room_W = np.empty_like(self._end)
            address = room_W.ctypes.data
        else:
            room_W, address = room
        row.matcher.unsafe_compute_mask_ptr(address, self._end.nbytes)
        if row.matcher.is_error():
            row.problem = f"the answer cannot be kept to its constraint: {_first_line(row.matcher.get_error())}"
            row.bits = None
        else:
            row.bits = self._without_end(room_W) if row.endless else room_W

    def _without_end(self, bits_W: Bits) -> Bits:
        """For a row that ignores the end: it comes only where nothing else can, and then again and again."""
        other = bits_W & ~self._end
        return other if other.any() else bits_W


def _spare(row: Matching, way: list[int]) -> int:
    """Tokens that are left to a row beside those to its end."""
    return row.limit - len(row.tokens) - 1 - len(way) - MARGIN


def _hurry(row: Matching) -> int:
    """With less than that to spare a row is led to its end: there would soon be a look at every token."""
    return max(4, min(16, row.limit // 16))


def _only(bits_W: Bits) -> int:
    """The one token of a mask; -1 where there are more."""
    if np.count_nonzero(bits_W) != 1:
        return -1
    place = int(np.flatnonzero(bits_W)[0])
    word = int(bits_W[place]) & 0xFFFFFFFF
    return 32 * place + word.bit_length() - 1 if word & (word - 1) == 0 else -1


def _first_line(reason: str) -> str:
    return reason.strip().split("\n")[0][:200]


class _Words:
    """A tokenizer in the library's form. It asks how a text that has to come is written, to have it written so."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special)
        self.eos_token_id = vocabulary.ends[0]
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ids: dict[bytes, int] = {}
        self._longest = 0
        self._asked = lru_cache(ASKED)(self._written)

    def __call__(self, text: str) -> list[int]:
        return self._asked(text)  # the library asks for a few texts again and again, and only reads what it gets

    def _written(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, False).tolist()
        if max(ids, default=0) < len(self.tokens) and self._vocabulary.text(ids) == text.encode():
            return list(ids)
        return self._longest_first(text.encode())

    def _longest_first(self, text: bytes) -> list[int]:
        """For texts with a special token's name in them, and for tokenizers that add a space."""
        if not self._ids:
            self._ids = {word: i for i, word in enumerate(self.tokens) if word and i not in self._vocabulary.special}
            self._longest = max(map(len, self._ids))
        ids: list[int] = []
        while text:
            for length in range(min(self._longest, len(text)), 0, -1):
                found = self._ids.get(text[:length])
                if found is not None:
                    ids.append(found)
                    text = text[length:]
                    break
            else:
                break
        return ids
