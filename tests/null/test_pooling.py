"""How an encoder's vectors are made is read from its small files, and refused where they ask for anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from echo_job import chat
from encoder_folder import CONTEXT, FLAGS, WIDTH, write_encoder, write_pooling
from test_embeddings import embedding

from shoal.core.errors import ModelError, RowError
from shoal.jobs.encode import Encoded, RowEncoder
from shoal.jobs.settings import JobSettings
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import EMBEDDED, ModelInfo
from shoal.text.pooling import read_pooling
from shoal.text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", list(FLAGS))
@pytest.mark.parametrize("normalize", [True, False])
def test_each_way_of_pooling_is_read(tmp_path: Path, kind: str, normalize: bool) -> None:
    write_pooling(tmp_path, kind, normalize)
    found = read_pooling(tmp_path)
    assert (found.kind, found.normalize, found.most_tokens) == (kind, normalize, None)
    assert {path.name for path in found.files} == {"modules.json", "config.json"}


def test_the_limit_of_the_texts_is_the_context(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    info = ModelInfo.load(folder, Tokenizer.load(folder))
    assert (info.context, info.vector) == (CONTEXT, WIDTH)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 1000}')
    assert ModelInfo.load(folder, Tokenizer.load(folder)).context == 64, "no more than there are positions"


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("modules.json", "[", "not valid JSON"),
        ("modules.json", '{"a": 1}', "list of objects"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "no Pooling"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "Dense"),
        ("1_Pooling/config.json", "{}", "pooling by nothing"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", json.dumps(dict.fromkeys(FLAGS.values(), True)), "one at a time"),
        ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', "weightedmean"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "max_seq_length"),
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', "default prompt"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, file: str, text: str, word: str) -> None:
    write_encoder(tmp_path)
    read_pooling(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelError, match=word):
        read_pooling(tmp_path)


def test_a_newer_file_names_its_way_of_pooling(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert read_pooling(tmp_path).kind == "last"


def test_an_encoder_without_these_files_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(ModelError, match="sentence-transformers"):
        read_pooling(tmp_path)


def decoder_folder(tmp_path: Path, kind: str) -> Path:
    """The embedded model's folder as one that makes vectors too, of at most 8 tokens."""
    shutil.copytree(EMBEDDED, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    write_pooling(tmp_path, kind, max_seq_length=8)
    return tmp_path


def encoded(folder: Path, lines: list[str]) -> list[Encoded | RowError]:
    tokenizer = Tokenizer.load(folder)
    info = ModelInfo.load(folder, tokenizer)
    encoder = RowEncoder(tokenizer, ChatTemplate.load(folder), info, JobSettings("any"))
    return encoder.encode([line.encode() for line in lines])


def test_what_limits_vectors_limits_no_text_of_a_decoder(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path, "last")
    long = "a river and a stone and a fish"
    text, short, cut = encoded(folder, [chat(1, long), embedding(2, "a"), embedding(3, long)])
    assert isinstance(text, Encoded) and isinstance(short, Encoded)
    assert isinstance(cut, RowError) and cut.code == "context_length_exceeded" and "8 tokens" in str(cut)
    whole = ModelInfo.load(folder, Tokenizer.load(folder))
    assert (whole.context, whole.vector_context) == (ModelInfo.load(EMBEDDED, Tokenizer.load(EMBEDDED)).context, 8)


def test_pooling_that_a_decoder_cannot_do_fails_the_rows_that_need_it(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path, "mean")
    text, vector = encoded(folder, [chat(1), embedding(2, "a")])
    assert isinstance(text, Encoded)
    assert isinstance(vector, RowError) and "over a decoder pooling is by lasttoken" in str(vector)
    (folder / "modules.json").write_text("[")
    text, vector = encoded(folder, [chat(1), embedding(2, "a")])
    assert isinstance(text, Encoded) and isinstance(vector, RowError) and "not valid JSON" in str(vector)
