"""Words of files, models and servers as a terminal or a page may hold them.

Such words may hold what a terminal obeys rather than shows, and what no output can be written with. It must not know
where words come from, nor how they are shown.
"""

from __future__ import annotations

import re

_MORE = "\x7f-\x9f\ud800-\udfff\ufffe\uffff"  # DEL, control characters again, halves of pairs, no characters
_UNSEEN, _UNSEEN_IN_LINES = re.compile(f"[\x00-\x1f{_MORE}]"), re.compile(f"[\x00-\x09\x0b-\x1f{_MORE}]")


def printable(words: str, lines: bool = False) -> str:
    """The words with a sign in place of each character that is not to be seen; with `lines` their ends stay."""
    return (_UNSEEN_IN_LINES if lines else _UNSEEN).sub("\ufffd", words)
