"""Two texts as one prompt, as a tokenizer joins them: special tokens before, between and after.

It knows tokens alone, and must not know which texts they are.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import tokenizers

from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Tokens

_PROBE = "0"  # a text that every tokenizer has a token of


@dataclass(frozen=True, slots=True)
class Joint:
    """How a tokenizer joins two texts."""

    before: Tokens
    between: Tokens
    after: Tokens
    marked: int  # tokens of `between` that count to the first text where a model tells two apart; -1: none are told

    @property
    def num_special(self) -> int:
        """Tokens beside the two texts' own."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: Tokens, second: Tokens, most: int | None = None) -> tuple[Tokens, int]:
        """The prompt of two texts, and where in it the second begins. With more than `most` tokens the longer of the
        two loses its end until both are equally long; then both do."""
        if most is not None:
            room = most - self.num_special
            if room < 0:
                raise RowError(
                    f"truncate_prompt_tokens {most} has no room for the {self.num_special} special tokens: raise it",
                    param="truncate_prompt_tokens",
                )
            first, second = _cut(first, second, room)
        begin = len(self.before) + len(first) + (len(self.between) if self.marked < 0 else self.marked)
        whole = self.before + first + self.between + second + self.after
        return whole, len(whole) if self.marked < 0 else begin


def _cut(first: Tokens, second: Tokens, room: int) -> tuple[Tokens, Tokens]:
    """Both within so many tokens, as transformers' `longest_first` cuts them: an odd one goes to the longer."""
    if len(first) + len(second) <= room:
        return first, second
    short = min(len(first), len(second))
    short = short if 2 * short <= room else room // 2
    if len(first) > len(second):
        return first[: room - short], second[:short]
    return first[:short], second[: room - short]


def read_joint(backend: tokenizers.Tokenizer) -> Joint | None:
    """How this tokenizer joins two texts; None where it does more than put tokens around them."""
    bare = list(backend.encode(_PROBE, add_special_tokens=False).ids)
    pair = backend.encode(_PROBE, _PROBE)
    ids, kinds = list(pair.ids), list(pair.type_ids)
    places = [place for place in range(len(ids) - len(bare) + 1) if bare and ids[place : place + len(bare)] == bare]
    if len(places) < 2 or places[-1] < places[0] + len(bare):
        return None
    end, begin = places[0] + len(bare), places[-1]
    if 1 not in kinds:
        marked = -1
    else:
        marked = kinds.index(1) - end
        if marked < 0 or kinds != sorted(kinds) or kinds[begin] != 1:
            return None
    return Joint(
        array(TOKEN, ids[: places[0]]), array(TOKEN, ids[end:begin]), array(TOKEN, ids[begin + len(bare) :]), marked
    )
