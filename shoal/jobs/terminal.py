"""Words for a terminal, which obeys some characters: no other module here makes rich's texts.

It must not know what is said.
"""

from __future__ import annotations

from rich.text import Text

from shoal.core.printable import printable


def said(words: str, style: str = "", lines: bool = False) -> Text:
    """Words as they stand, be they a file's or a server's; with `lines` they may have several."""
    return Text(printable(words, lines), style=style)
