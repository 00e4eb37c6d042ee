"""Text to token ids and back, by a checkpoint's own rules.

Knows the tokenizer library and the ids with a role (begin, end, special); it must not know about chats, jobs or
tensors. `Tokenizer` equals what transformers produces for the same folder.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from shoal.core.types import TOKEN, Tokens
from shoal.text import files, words
from shoal.text.decoding import Decoding
from shoal.text.joint import Joint, read_joint
from shoal.text.unicode import check

BATCH_TEXTS = 2048  # texts the library encodes at once, and the characters in them: both bound its memory, about
BATCH_CHARACTERS = 1 << 18  # 150 bytes a token while a batch is being encoded


class Tokenizer:
    """A tokenizer and the ids with a role. Encoding keeps a cache of words; no method's answer depends on it."""

    def __init__(self, source: files.TokenizerFiles) -> None:
        backend = files.build(source)
        self.backend = backend
        self.decoding = Decoding(backend)
        self.hash = source.digest()
        named = {name: token.content for name, token in source.named_tokens().items()}
        self.named: dict[str, str] = named
        """Texts of the tokens with a role: bos_token, eos_token, …; chat templates see them under these names."""
        roles = {name: backend.token_to_id(text) for name, text in named.items()}
        self.bos: int | None = roles.get("bos_token")
        eos = roles.get("eos_token")
        self.eos: frozenset[int] = frozenset(source.eos_ids() if eos is None else (eos, *source.eos_ids()))
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        ends_of_text = _ends(backend)
        self._before, self._after = ends_of_text or (array(TOKEN), array(TOKEN))
        self.num_after = len(self._after)  # tokens that `special` puts behind every text
        self.joint: Joint | None = read_joint(backend)  # how two texts become one prompt; None: in no way known here
        self._words = words.word_encoder(backend) if ends_of_text is not None else None

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint folder. ModelError says what is missing and how to make it."""
        return cls(files.TokenizerFiles.read(Path(folder)))

    def encode(self, text: str, special: bool = True) -> Tokens:
        """The token ids of a text, with the begin and end tokens the model expects where `special`.

        Added tokens written in the text are recognised either way. RowError for a text that is not valid Unicode.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[Tokens]:
        """`encode` of every text; faster than one by one. RowError names the first text that is not valid Unicode."""
        fast = self._words.encode if self._words is not None else None
        before, after = (self._before, self._after) if special else (array(TOKEN), array(TOKEN))
        results: list[Tokens] = []
        slow: list[int] = []
        for text in texts:
            ids = fast(text) if fast is not None else None
            if ids is None:
                slow.append(len(results))
                ids = array(TOKEN)
            elif before or after:
                ids = before + ids + after
            results.append(ids)
        for i in slow:
            check(texts[i], i if len(texts) > 1 else None)
        for part in _batches(texts, slow):
            encodings = self.backend.encode_batch_fast([texts[i] for i in part], add_special_tokens=special)
            for i, encoding in zip(part, encodings, strict=True):
                results[i] = array(TOKEN, encoding.ids)
        return results

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens; ids outside the vocabulary say nothing. No spaces are cleaned up."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, exactly: it may be part of a character. b'' outside the vocabulary."""
        return self.decoding.bytes_of(token)

    def token_text(self, token: int) -> str:
        """One token for display; U+FFFD where it is only a part of a character."""
        return self.decoding.bytes_of(token).decode("utf-8", "replace")


def _batches(texts: Sequence[str], chosen: list[int]) -> Iterator[list[int]]:
    """Cut the chosen texts into batches of bounded number and size; a text longer than the bound goes alone."""
    part: list[int] = []
    size = 0
    for i in chosen:
        if part and (len(part) >= BATCH_TEXTS or size + len(texts[i]) > BATCH_CHARACTERS):
            yield part
            part, size = [], 0
        part.append(i)
        size += len(texts[i])
    if part:
        yield part


def _ends(backend: tokenizers.Tokenizer) -> tuple[Tokens, Tokens] | None:
    """The ids that post-processing puts before and after every text; None when it does more than that."""
    bare = list(backend.encode("0", add_special_tokens=False).ids)
    full = list(backend.encode("0", add_special_tokens=True).ids)
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return array(TOKEN, full[:start]), array(TOKEN, full[start + len(bare) :])
    return None
