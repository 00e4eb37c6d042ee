"""An answer's text does not depend on when its tokens came, and is never wrong for a moment."""

from __future__ import annotations

import codecs
import random
from functools import cache
from pathlib import Path

import pytest
import some_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.errors import RowError
from shoal.text.decoding import Kind
from shoal.text.detok import Detokenizer
from shoal.text.tokenizer import Tokenizer

NAMES = [*some_tokenizers.FOLDERS, "llama", "gemma"]
TEXTS = ["日本語🙂 é\u0301", "a b  c\n\nabc", "👨‍👩‍👧 x", "\ufffd?", "<|im_end|> ok", "naïve “quotes”…", "\x00\t\r\n"]
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param in some_tokenizers.FOLDERS:
        return some_tokenizers.load(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return Tokenizer.load(some_tokenizers.write_sentencepiece(folder, gemma=request.param == "gemma"))


@cache
def _encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, special=False))


def _answer(tokenizer: Tokenizer, seed: int) -> list[int]:
    """Random ids, single bytes, special tokens and pieces of real text, cut where it hurts."""
    draw = random.Random(seed)
    ids: list[int] = []
    for _ in range(draw.randrange(12)):
        kind = draw.randrange(4)
        if kind == 0:
            ids += [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randrange(4))]
        elif kind == 1:
            ids += [draw.randrange(300) for _ in range(draw.randrange(5))]
        elif kind == 2:
            ids += draw.sample(sorted(tokenizer.special_ids), 1)
        else:
            some = _encoded(tokenizer, draw.choice(TEXTS))
            ids += some[draw.randrange(2) : len(some) - draw.randrange(2)]
    return ids


def _pieces(ids: list[int], seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    pieces, start = [], 0
    while start < len(ids):
        size = draw.choice((0, 1, 1, 2, 5))
        pieces.append(ids[start : start + size])
        start += size
    return pieces


@quick
@given(seed=st.integers(0, 1 << 32), skip=st.booleans())
def test_the_pushes_together_are_the_decode(tokenizer: Tokenizer, seed: int, skip: bool) -> None:
    ids = _answer(tokenizer, seed)
    detok = Detokenizer(tokenizer, skip_special=skip)
    out = [detok.push(piece) for piece in _pieces(ids, seed)]
    assert "".join(out) + detok.finish() == tokenizer.decode(ids, skip)
    assert (detok.num_tokens, detok.stopped) == (len(ids), None)


@quick
@given(seed=st.integers(0, 1 << 32))
def test_text_once_given_out_is_never_taken_back(tokenizer: Tokenizer, seed: int) -> None:
    ids = _answer(tokenizer, seed)
    detok = Detokenizer(tokenizer)
    shown = ""
    for token in ids:
        shown += detok.push([token])
        assert tokenizer.decode(ids).startswith(shown)


@quick
@given(seed=st.integers(0, 1 << 32), include=st.booleans(), least=st.integers(0, 8), skip=st.booleans())
def test_stopping_does_not_depend_on_the_pushes(
    tokenizer: Tokenizer, seed: int, include: bool, least: int, skip: bool
) -> None:
    ids = _answer(tokenizer, seed)
    text = tokenizer.decode(ids, skip)
    draw = random.Random(seed)
    places = [draw.randrange(len(text) + 1) for _ in range(3)]
    stop = tuple(s for p in places if (s := text[p : p + draw.randrange(1, 4)]) and "\ufffd" not in s) or ("zzz",)
    results = []
    for number in range(3):
        detok = Detokenizer(tokenizer, skip, stop, include, least)
        pieces = [[i] for i in ids] if number == 0 else [ids] if number == 1 else _pieces(ids, seed)
        found = "".join([detok.push(piece) for piece in pieces])
        results.append((found + detok.finish(), detok.stopped, detok.num_tokens))
    assert results[0] == results[1] == results[2]
    assert results[0] == _plain_stop(tokenizer, ids, skip, stop, include, least)


def _plain_stop(
    tokenizer: Tokenizer, ids: list[int], skip: bool, stop: tuple[str, ...], include: bool, least: int
) -> tuple[str, str | None, int]:
    """The specification: decode again after each token, and look for the stop string that ends first."""
    early = len(_whole(tokenizer, ids[:least], skip)) if least else 0
    for count in range(least + 1, len(ids) + 1):
        text = _whole(tokenizer, ids[:count], skip)
        found = []
        for string in stop:
            start = text.find(string, max(0, early - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start, string))
        if found:
            end, start, string = min(found)
            return text[: end if include else start], string, count
    return tokenizer.decode(ids, skip), None, len(ids)


def _whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """A decode without the incomplete character, or the run of bytes with a bad one, at its end."""
    shown = [i for i in ids if not (skip and i in tokenizer.special_ids)]
    if tokenizer.decoding.kind is Kind.BYTES:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(b"".join(map(tokenizer.token_bytes, shown)))
    start = len(shown)
    while start and (not tokenizer.token_bytes(shown[start - 1]) or _is_byte(tokenizer, shown[start - 1])):
        start -= 1
    run = b"".join(map(tokenizer.token_bytes, shown[start:]))
    for drop in range(4):
        try:
            run[: len(run) - drop].decode()
            codecs.utf_8_decode(run, "strict", False)
        except UnicodeDecodeError:
            continue
        whole = [t for t in shown[start:] if tokenizer.token_bytes(t)]
        return tokenizer.decode(shown[:start] + whole[: len(whole) - drop], False)
    return tokenizer.decode(shown[:start], False)


def _is_byte(tokenizer: Tokenizer, token: int) -> bool:
    return (tokenizer.backend.id_to_token(token) or "").startswith("<0x")


def test_a_stop_string_is_found_across_tokens() -> None:
    tokenizer = some_tokenizers.load("minnow")
    ids = tokenizer.encode("one two\n\nQuestion: three", special=False).tolist()
    for include, text in ((False, "one two"), (True, "one two\n\nQuestion:")):
        detok = Detokenizer(tokenizer, stop=("never", "\n\nQuestion:"), include_stop=include)
        assert "".join(detok.push([i]) for i in ids) == text
        assert detok.finish() == ""
        assert detok.stopped == "\n\nQuestion:"
        assert tokenizer.decode(ids[: detok.num_tokens]) == "one two\n\nQuestion:"


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = some_tokenizers.load("minnow")
    detok = Detokenizer(tokenizer, stop=("abcd",))
    letters = {c: tokenizer.encode(c, special=False).tolist() for c in "abcx"}
    assert [detok.push(letters[c]) for c in "xabxabc"] == ["x", "", "", "abx", "", "", ""]
    assert detok.finish() == "abc"


def test_of_two_stop_strings_the_first_to_end_wins() -> None:
    tokenizer = some_tokenizers.load("minnow")
    ids = tokenizer.encode("say abcde", special=False).tolist()
    for stop, text, found in (
        (("abcde", "bc"), "say a", "bc"),
        (("bc", "abc"), "say ", "abc"),  # both end together: the longer
        (("e", "abcd"), "say ", "abcd"),
    ):
        detok = Detokenizer(tokenizer, stop=stop)
        assert detok.push(ids) == text
        assert detok.stopped == found


def test_a_stop_string_is_not_looked_for_in_the_first_tokens() -> None:
    tokenizer = some_tokenizers.load("minnow")
    bang = tokenizer.encode("!", special=False).tolist()
    assert len(bang) == 1
    for least in range(5):
        detok = Detokenizer(tokenizer, stop=("!",), min_tokens=least)
        assert detok.push(bang * 6) == "!" * least
        assert detok.num_tokens == least + 1
    detok = Detokenizer(tokenizer, stop=("!!",), min_tokens=3)  # may begin early, must end late
    assert detok.push(bang * 6) == "!!"
    assert detok.num_tokens == 4


def test_special_tokens_are_silent_unless_wanted() -> None:
    tokenizer = some_tokenizers.load("minnow")
    end = max(tokenizer.eos)
    word = tokenizer.encode("word", special=False).tolist()
    assert Detokenizer(tokenizer).push([*word, end]) == "word"
    assert Detokenizer(tokenizer, skip_special=False).push([*word, end]) == "word" + tokenizer.token_text(end)
    assert Detokenizer(tokenizer, stop=(tokenizer.token_text(end),)).push([*word, end, *word]) == "wordword"


def test_half_a_character_waits_for_its_rest() -> None:
    tokenizer = some_tokenizers.load("minnow")
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    smile = [single[bytes((b,))] for b in "🙂".encode()]
    detok = Detokenizer(tokenizer)
    assert [detok.push([i]) for i in smile] == ["", "", "", "🙂"]
    detok.push(smile[:3])
    assert detok.finish() == "\ufffd"


def test_other_decoders_are_read_through_a_window(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(some_tokenizers.write_metaspace(tmp_path))
    for seed in range(50):
        ids = [random.Random(seed + i).randrange(tokenizer.vocab_size) for i in range(seed)]
        detok = Detokenizer(tokenizer)
        assert "".join(detok.push([i]) for i in ids) + detok.finish() == tokenizer.decode(ids)


def test_an_empty_stop_string_is_a_mistake() -> None:
    with pytest.raises(RowError, match="empty"):
        Detokenizer(some_tokenizers.load("minnow"), stop=("a", ""))
