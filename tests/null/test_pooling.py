"""How an encoder's vectors are made is read from its small files, and refused where they ask for anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoder_folder import CONTEXT, FLAGS, WIDTH, write_encoder, write_pooling

from shoal.core.errors import ModelError
from shoal.text.checkpoint import ModelInfo
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
