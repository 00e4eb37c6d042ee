"""Vectors of decoders: the last token's hidden state, equal to transformers', with prefixes computed once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_model import save_byte_model
from encoders import write_pooling

import shoal
from shoal.jobs.report import Report
from shoal.text.tokenizer import Tokenizer

STEM = "Instruct: say where the river goes.\nQuery: "
TEXTS = [STEM + word for word in ("the sea", "the lake", "a long way down", "")] + ["x", "a text of its own"]


def run(folder: Path, place: Path, bodies: list[tuple[str, dict[str, object]]]) -> Report:
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return shoal.run(place / "in.jsonl", place / "out.jsonl", model=str(folder), threads=1)


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_of_a_decoder_are_those_of_transformers(tmp_path: Path, normalize: bool) -> None:
    folder = tmp_path / "model"
    model = save_byte_model(folder)
    write_pooling(folder, "last", normalize)
    bodies: list[tuple[str, dict[str, object]]] = [("/v1/embeddings", {"input": text}) for text in TEXTS]
    bodies.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3}))
    report = run(folder, tmp_path, bodies)
    assert report.exit_code == 0 and report.problems() == [], "a decoder answers both kinds of rows"
    answers = [json.loads(line)["response"]["body"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ids = [list(each) for each in Tokenizer.load(folder).encode_batch(TEXTS)]
    for prompt, answer in zip(ids, answers, strict=False):
        with torch.inference_mode():
            wanted = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        wanted = wanted / wanted.norm() if normalize else wanted
        got = torch.tensor(answer["data"][0]["embedding"])
        assert (got - wanted).abs().max() < 1e-4 and answer["usage"]["prompt_tokens"] == len(prompt)
    tokens = report.tokens
    assert tokens.prompt_computed == tokens.prompt_bound <= tokens.prompt - 3 * len(STEM) * 2 // 3


def test_other_pooling_over_a_decoder_fails_the_rows_that_need_it(tmp_path: Path) -> None:
    save_byte_model(tmp_path / "model")
    write_pooling(tmp_path / "model", "mean", max_seq_length=4)
    chat = {"messages": [{"role": "user", "content": "longer than vectors may be"}], "max_tokens": 3}
    report = run(tmp_path / "model", tmp_path, [("/v1/embeddings", {"input": "a"}), ("/v1/chat/completions", chat)])
    assert report.exit_code == 3 and (report.rows.ok, report.rows.failed) == (1, 1)
    assert "over a decoder" in report.errors["not_supported"].message
