"""Texts become the tokens that the checkpoint's own files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import some_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.errors import ModelError, RowError
from shoal.text import words
from shoal.text.decoding import Kind
from shoal.text.tokenizer import Tokenizer

VECTORS = some_tokenizers.SHARED / "tokenizers" / "test_vectors"
FAST = ["minnow", "gpt2", "qwen2"]
SAFE = [chr(c) for c in (*range(0x17F), *range(0x2010, 0x2028), *range(0x2030, 0x205F), 0x20AC, 0x2122, 0x2212)]
BITS = ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\x85", "\xa0", "<|im_start|>", "<|endoftext|>", "<|im_end|>"]
WILD = ["é", "e\u0301", "ſ", "日本", "🙂", "\u2028", "\ufeff", "ﬁ", "Å", "²", "Ⅷ", "\u0338", "<s>", "<|end|>", "</s>"]

safe_text = st.lists(st.sampled_from(SAFE) | st.sampled_from(BITS) | st.text("abcXYZ019", max_size=5)).map("".join)
any_text = st.lists(st.sampled_from(BITS + WILD) | st.text(max_size=6).filter(lambda t: t.isprintable())).map("".join)
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox_20b"])
def test_published_vectors_are_reproduced(name: str) -> None:
    tokenizer = some_tokenizers.load(name)
    texts = (VECTORS / "input.txt").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (VECTORS / f"{name}.out").read_text(encoding="utf-8").split("\n")
    wanted = [[int(word) for word in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == 47
    assert [tokenizer.encode(text, special=False).tolist() for text in texts] == wanted
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts, special=False)] == wanted


@pytest.mark.parametrize("name", FAST)
@quick
@given(text=safe_text)
def test_the_fast_path_is_the_library(name: str, text: str) -> None:
    tokenizer = some_tokenizers.load(name)
    encoder = words.word_encoder(tokenizer.backend)
    assert encoder is not None
    wanted = tokenizer.backend.encode(text, add_special_tokens=False).ids
    for _ in range(2):  # the second time from the caches
        found = encoder.encode(text)
        assert found is not None
        assert found.tolist() == wanted


@pytest.mark.parametrize("pattern", words.PATTERNS)
@quick
@given(text=safe_text)
def test_words_are_split_as_the_library_splits_them(pattern: str, text: str) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    wanted = [word for word, _ in Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
    assert words.compile_pattern(pattern).findall(text) == wanted


@pytest.mark.parametrize("name", list(some_tokenizers.FOLDERS))
@quick
@given(texts=st.lists(safe_text | any_text, max_size=4))
def test_a_batch_is_its_texts_one_by_one(name: str, texts: list[str]) -> None:
    tokenizer = some_tokenizers.load(name)
    for special in (True, False):
        wanted = [tokenizer.backend.encode(text, add_special_tokens=special).ids for text in texts]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts, special)] == wanted
        assert [tokenizer.encode(text, special).tolist() for text in texts] == wanted


def test_what_encode_returns_is_the_callers_own() -> None:
    tokenizer = some_tokenizers.load("minnow")
    for text in ("hello there", "<|im_end|>", ""):
        first = tokenizer.encode(text)
        wanted = first.tolist()
        first.append(7)
        assert tokenizer.encode(text).tolist() == wanted


@pytest.mark.parametrize("name", ["minnow", "qwen2", "stories260K"])
@quick
@given(text=any_text | safe_text)
def test_token_bytes_are_what_a_decode_shows(name: str, text: str) -> None:
    tokenizer = some_tokenizers.load(name)
    ids = tokenizer.encode(text, special=False).tolist()
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    shown = tokenizer.decode(ids, skip_special=False)
    assert spelled.decode()[tokenizer.decoding.strip if spelled.startswith(b" ") else 0 :] == shown
    assert all(tokenizer.token_text(i) == tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids)


@pytest.mark.parametrize("name", list(some_tokenizers.FOLDERS))
def test_ids_outside_the_vocabulary_say_nothing(name: str) -> None:
    tokenizer = some_tokenizers.load(name)
    outside = tokenizer.vocab_size + 5
    assert tokenizer.token_bytes(outside) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_text(outside) == ""
    assert tokenizer.decode([outside]) == ""


def test_a_lone_surrogate_costs_its_row_only() -> None:
    tokenizer = some_tokenizers.load("minnow")
    with pytest.raises(RowError, match=r"U\+D800 at character 1"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(RowError, match="text 1 has a lone surrogate"):
        tokenizer.encode_batch(["fine", "\udfff", "日本"])
    assert tokenizer.encode_batch([]) == []


def test_ids_with_a_role_come_from_every_file() -> None:
    qwen = some_tokenizers.load("qwen2")
    assert (qwen.bos, qwen.eos, qwen.vocab_size) == (None, frozenset({151643, 151645}), 151646)
    assert qwen.special_ids == {151643, 151644, 151645}
    gpt2 = some_tokenizers.load("gpt2")
    assert (gpt2.bos, gpt2.eos, gpt2.vocab_size) == (50256, frozenset({50256}), 50257)
    stories = some_tokenizers.load("stories260K")
    assert (stories.bos, stories.eos, stories.encode("a")[0]) == (1, frozenset({2}), 1)


def test_begin_and_end_tokens_follow_the_configuration(tmp_path: Path) -> None:
    some_tokenizers.write_sentencepiece(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def ends(**flags: bool) -> tuple[int, int]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
        ids = Tokenizer.load(tmp_path).encode("abc")
        assert Tokenizer.load(tmp_path).encode("abc", special=False)[0] > 4
        return int(ids[0] == 1), int(ids[-1] == 2)

    assert ends() == (1, 0)  # as the file's own post-processor says
    assert ends(add_bos_token=False) == (0, 0)
    assert ends(add_bos_token=True, add_eos_token=True) == (1, 1)
    assert ends(add_eos_token=True) == (0, 1)


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    letters = {letter: i for i, letter in enumerate(words.byte_letters().values())}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    added = {"300": {"content": "<|a|>", "special": True}, "310": {"content": "<|b|>", "special": False}}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|a|>",
        "unk_token": "<|a|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|b|>x<|a|>").tolist() == [310, letters["x"], 300]
    assert (tokenizer.vocab_size, tokenizer.eos) == (311, frozenset({300}))
    assert tokenizer.decode([310, letters["x"], 300]) == "<|b|>x"
    assert tokenizer.decode([310, letters["x"], 300], skip_special=False) == "<|b|>x<|a|>"


def test_the_hash_stands_for_the_files(tmp_path: Path) -> None:
    first = Tokenizer.load(some_tokenizers.write_sentencepiece(tmp_path)).hash
    assert Tokenizer.load(tmp_path).hash == first
    (tmp_path / "README.md").write_text("not a tokenizer file")
    assert Tokenizer.load(tmp_path).hash == first
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert Tokenizer.load(tmp_path).hash != first


def test_decoders_are_recognised(tmp_path: Path) -> None:
    assert some_tokenizers.load("minnow").decoding.kind is Kind.BYTES
    assert Tokenizer.load(some_tokenizers.write_sentencepiece(tmp_path)).decoding.kind is Kind.PIECES
    assert Tokenizer.load(some_tokenizers.write_metaspace(tmp_path)).decoding.kind is Kind.LIBRARY


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer.model": "x"}, "save_pretrained"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "JSON object"),
        ({"vocab.json": "{}", "merges.txt": "a b"}, "do not fit together"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'},
            "RobertaTokenizer",
        ),
        ({"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"eos_token": 3}'}, "special token"),
        ({"vocab.json": "{}", "merges.txt": "", "added_tokens.json": '{"a": "x"}'}, "added_tokens"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        Tokenizer.load(tmp_path / "absent")
