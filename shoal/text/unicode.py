"""Whether a text can be written down at all. It must not know where texts come from or go to."""

from __future__ import annotations

from shoal.core.errors import RowError


def check(text: str, number: int | None = None) -> None:
    """RowError for a text that cannot be written as UTF-8 (lone surrogates); `number` names it among several."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        which = "the text" if number is None else f"text {number}"
        code = ord(text[error.start])
        raise RowError(
            f"{which} has a lone surrogate U+{code:04X} at character {error.start}: it is not valid Unicode; "
            "write the character itself or a whole surrogate pair",
            code="invalid_unicode",
        ) from error
