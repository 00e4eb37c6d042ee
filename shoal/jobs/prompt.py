"""How the columns of a plain row become its prompt. It must not know files, nor models."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from shoal.core.errors import RowError, UsageError

_text = msgspec.json.Decoder(str)


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with column names in braces: 'Summarize: {text}'. `{{` and `}}` are braces themselves.

    Only whole columns can be named: no attributes, indexes, conversions or formats, so a template runs no code.
    """

    text: str
    pieces: tuple[tuple[str, str], ...]  # pairs of literal text and the column after it; '' for no column

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Raises UsageError for anything but plain column names in braces."""
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"--prompt {text!r}: {error}; write {{{{ and }}}} for braces themselves") from None
        pieces = []
        for literal, name, spec, conversion in parsed:
            if name is not None and (not name or spec or conversion or any(c in name for c in ".[]{}")):
                raise UsageError(
                    f"--prompt {text!r}: braces may hold the name of a column and nothing else, not {name or ''!r};"
                    " write {{ and }} for braces themselves"
                )
            pieces.append((literal, name or ""))
        return cls(text, tuple(pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns it needs, in order of appearance."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name))

    def fill(self, columns: Mapping[str, msgspec.Raw]) -> str:
        """The prompt of a row, its columns' values given as JSON. Raises RowError for one that is missing or null."""
        out = []
        for literal, name in self.pieces:
            out.append(literal)
            if name:
                out.append(_value(name, columns))
        return "".join(out)


def _value(name: str, columns: Mapping[str, msgspec.Raw]) -> str:
    """A text as it is; numbers, lists and objects as their JSON writes them."""
    if name not in columns:
        known = ", ".join(repr(c) for c in list(columns)[:20]) or "none"
        raise RowError(f"the row has no column {name!r}; its columns are {known}", "missing_column", name)
    value = bytes(columns[name])
    if value == b"null":
        raise RowError(f"column {name!r} is null in this row: fill it, or leave the row out", "missing_column", name)
    return _text.decode(value) if value.startswith(b'"') else value.decode()


DEFAULT_PROMPT = PromptTemplate.parse("{prompt}")
"""For plain rows without --prompt: the column named 'prompt'."""
