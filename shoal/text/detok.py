"""An answer's text, token by token: never half a character, and stop strings found wherever token borders fall.

Knows how decoded pieces join and when a text is over; it must not know requests, sampling or files.

The text of all pushes and of `finish` together is the decode of the tokens, whatever the pushes were. Text is given
out as soon as no later token can change it: an incomplete character waits for its other bytes, a run of byte tokens
of a SentencePiece vocabulary for its end (one bad byte spoils the whole run), and what may grow into a stop string
until it did or did not.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from shoal.core.errors import RowError
from shoal.text.decoding import Kind
from shoal.text.tokenizer import Tokenizer


class _Reader(Protocol):
    """Turns tokens into text that no later token can change."""

    def add(self, token: int) -> str:
        """The text that became certain with this token."""

    def ahead(self) -> str:
        """What is not certain yet but would be the rest of the text if the answer ended here, as far as complete."""

    def end(self) -> str:
        """The rest of the text: no token follows."""


class _ByteReader:
    """Kind.BYTES: the tokens' bytes read as UTF-8; the incremental decoder keeps an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes = tokenizer.decoding.piece
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self.decoder.decode(self.bytes(token))  # type: ignore[arg-type]  # pieces of Kind.BYTES are bytes

    def ahead(self) -> str:
        return ""

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


class _PieceReader:
    """Kind.PIECES: texts, and runs of bytes that count as characters only when the whole run is valid UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.piece = tokenizer.decoding.piece
        self.strip = tokenizer.decoding.strip  # leading spaces still to be dropped
        self.run = bytearray()

    def add(self, token: int) -> str:
        piece = self.piece(token)
        if isinstance(piece, int):
            self.run.append(piece)
            return ""
        if not piece:
            return ""
        return self._strip(self._read_run() + str(piece))

    def ahead(self) -> str:
        if not self.run:
            return ""
        try:
            text = codecs.utf_8_decode(self.run, "strict", False)[0]
        except UnicodeDecodeError:
            return ""
        return text[self._spaces(text) :]

    def end(self) -> str:
        return self._strip(self._read_run())

    def _read_run(self) -> str:
        run = bytes(self.run)
        self.run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _spaces(self, text: str) -> int:
        return min(self.strip, len(text) - len(text.lstrip(" ")))

    def _strip(self, text: str) -> str:
        spaces = self._spaces(text)
        if text:
            # Only spaces before the first other character are dropped.
            self.strip = self.strip - spaces if spaces == len(text) else 0
        return text[spaces:]


class _WindowReader:
    """Kind.LIBRARY: decodes the last few tokens with and without the new one, and takes the difference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.decode
        self.tokens: list[int] = []
        self.known = 0  # tokens at the window's start whose text is given out

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.decode(self.tokens, False)
        before = self.decode(self.tokens[: self.known], False)
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        del self.tokens[: self.known]
        self.known = len(self.tokens)
        return text[len(before) :]

    def ahead(self) -> str:
        return ""

    def end(self) -> str:
        return self.decode(self.tokens, False)[len(self.decode(self.tokens[: self.known], False)) :]


def _reader(tokenizer: Tokenizer) -> _Reader:
    match tokenizer.decoding.kind:
        case Kind.BYTES:
            return _ByteReader(tokenizer)
        case Kind.PIECES:
            return _PieceReader(tokenizer)
        case Kind.LIBRARY:
            return _WindowReader(tokenizer)


class Detokenizer:
    """The growing text of one answer. Changed by its owner alone: push, push, …, finish."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`min_tokens`: a stop string counts only if it ends in the text of a later token than that many.

        RowError for an empty stop string.
        """
        if not all(stop):
            raise RowError("a stop string is empty: leave it out", param="stop")
        self.skipped = tokenizer.special_ids if skip_special else frozenset()
        self.stop = stop
        self.include_stop = include_stop
        self.min_tokens = min_tokens if stop else 0
        self.stopped: str | None = None  # the stop string that ended the answer
        self.num_tokens = 0  # tokens of the answer so far: those after a stop string do not count
        self._reader = _reader(tokenizer)
        self._held = ""  # certain text that may be the beginning of a stop string
        self._closed = 0  # leading characters of it that are too early to end a stop string

    def push(self, tokens: Iterable[int]) -> str:
        """The new text that these tokens make certain; '' once a stop string was found."""
        out = []
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if token not in self.skipped:
                text = self._reader.add(token)
                out.append(self._take(text) if self.stop else text)
        return "".join(out)

    def finish(self) -> str:
        """The rest of the text, an incomplete character as U+FFFD; '' after a stop string."""
        if self.stopped is not None:
            return ""
        rest = self._held + self._reader.end()
        self._held = ""
        return rest

    def _take(self, text: str) -> str:
        """Add certain text; give out all of it that no stop string can reach."""
        held = self._held + text
        whole = held + self._reader.ahead()
        if self.num_tokens <= self.min_tokens:
            self._closed = len(whole)
        found = self._find(whole)
        if found is not None:
            start, self.stopped = found
            end = start + len(self.stopped)
            return whole[: end if self.include_stop else start]
        keep = max(_overlap(held, s) for s in self.stop)
        self._held = held[len(held) - keep :]
        self._closed = max(0, self._closed - (len(held) - keep))
        return held[: len(held) - keep]

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and string of the stop string that is complete first; of several that end together, the longest."""
        best: tuple[int, int, str] | None = None
        for string in self.stop:
            start = text.find(string, max(0, self._closed - len(string) + 1))
            if start >= 0 and (best is None or (start + len(string), start) < best[:2]):
                best = (start + len(string), start, string)
        return (best[1], best[2]) if best else None


def _overlap(text: str, string: str) -> int:
    """The longest proper beginning of `string` that `text` ends with."""
    for length in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
