"""Heads of classifiers say what transformers says: rewards, classes, scores of pairs, ranks, as rows of a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from encoders import reference
from heads import DECODERS, ENCODERS, WORDS, logits, save_decoder, save_embedder, save_encoder, words

import shoal
from shoal.core.errors import ShoalError
from shoal.jobs.report import Report
from shoal.text.tokenizer import Tokenizer

STEM = "Say how well the answer suits. What is the longest river of the world? "
TEXTS = [STEM + answer for answer in ("the Nile", "the Amazon", "a fish", "")] + ["x", "another text of its own"]


def run(folder: Path, rows: list[tuple[str, dict[str, Any]]], **options: Any) -> tuple[Report, list[Any], list[Any]]:
    """The report, the answers' bodies and the failed lines of a job over these urls and bodies."""
    place = folder.parent
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(rows)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, errors = place / "out.jsonl", place / "out.errors.jsonl"
    report = shoal.run(place / "in.jsonl", out, model=str(folder), threads=1, overwrite=True, **options)
    assert report.problems() == []
    answers = [json.loads(line)["response"]["body"] for line in out.read_text().splitlines()]
    return report, answers, [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else []


def some_text(luck: Random, most: int = 20) -> str:
    return " ".join(luck.choices(WORDS[4:], k=luck.randrange(1, most + 1)))


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_numbers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    model = save_decoder(folder, name, 3)
    rows = [("/pooling", {"input": text, "use_activation": False}) for text in TEXTS if text]
    rows.append(("/v1/pooling", {"input": TEXTS[:3], "use_activation": False}))
    report, answers, _ = run(folder, rows)
    ids = [list(each) for each in Tokenizer.load(folder).encode_batch([text for text in TEXTS if text])]
    wanted = torch.tensor([logits(model, each) for each in ids])
    got = torch.tensor([answer["data"][0]["data"] for answer in answers[:-1]])
    assert (got - wanted).abs().max() < 1e-4 and wanted.std(0).min() > 0.01
    assert [each["data"] for each in answers[-1]["data"]] == [answer["data"][0]["data"] for answer in answers[:3]]
    tokens = report.tokens
    assert tokens.prompt_computed == tokens.prompt_bound < tokens.prompt / 2, "what texts begin with is computed once"


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("labels", [1, 2, 3])
def test_an_encoders_numbers_are_those_of_transformers(tmp_path: Path, name: str, labels: int) -> None:
    folder, luck = tmp_path / "model", Random(4)
    model = save_encoder(folder, name, labels)
    texts = [some_text(luck) for _ in range(12)]
    _, answers, _ = run(folder, [("/pooling", {"input": texts, "use_activation": False})])
    wanted = torch.tensor([logits(model, words(name).encode(text).ids) for text in texts])
    got = torch.tensor([each["data"] for each in answers[0]["data"]])
    assert (got - wanted).abs().max() < 1e-4 and wanted.std(0).min() > 0.01


@pytest.mark.parametrize("name", ENCODERS)
def test_a_cross_encoder_scores_and_ranks_pairs_as_transformers_does(tmp_path: Path, name: str) -> None:
    folder, luck = tmp_path / "model", Random(5)
    model, tokenizer = save_encoder(folder, name), words(name)
    query, documents = some_text(luck, 8), [some_text(luck) for _ in range(9)]

    def number(first: str, second: str) -> float:
        both = tokenizer.encode(first, second)
        return sigmoid(logits(model, both.ids, both.type_ids if name == "bert" else None)[0])

    wanted = [number(query, document) for document in documents]
    rows = [
        ("/v1/rerank", {"query": query, "documents": documents}),
        ("/rerank", {"query": query, "documents": documents, "top_n": 3}),
        ("/v1/score", {"text_1": query, "text_2": documents}),
        ("/score", {"queries": documents, "documents": documents[::-1]}),
        ("/score", {"data_1": query, "data_2": documents[0]}),
    ]
    report, (ranked, best, scored, both, one), _ = run(folder, rows)
    assert report.exit_code == 0
    got = [each["score"] for each in scored["data"]]
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 1e-5 and max(wanted) - min(wanted) > 0.01
    order = sorted(range(9), key=lambda i: -got[i])
    assert [each["index"] for each in ranked["results"]] == order
    assert [each["relevance_score"] for each in ranked["results"]] == [got[i] for i in order]
    assert [each["document"]["text"] for each in ranked["results"]] == [documents[i] for i in order]
    assert best["results"] == ranked["results"][:3]
    pairs = [number(a, b) for a, b in zip(documents, documents[::-1], strict=True)]
    assert max(abs(a["score"] - b) for a, b in zip(both["data"], pairs, strict=True)) < 1e-5
    assert [each["score"] for each in one["data"]] == got[:1], "a pair alone is the pair among others"
    num_tokens = sum(len(tokenizer.encode(query, document).ids) for document in documents)
    assert scored["usage"] == ranked["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_a_decoder_computes_a_query_once_for_all_its_documents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, luck = save_decoder(folder), Random(6)
    documents = ["".join(luck.choices("abcdefgh ", k=luck.randrange(5, 30))) for _ in range(20)]
    report, (ranked,), _ = run(folder, [("/rerank", {"query": STEM, "documents": documents})])
    tokenizer = Tokenizer.load(folder)
    query, *others = (list(each) for each in tokenizer.encode_batch([STEM, *documents]))
    for each in ranked["results"]:
        wanted = sigmoid(logits(model, query + others[each["index"]])[0])
        assert abs(each["relevance_score"] - wanted) < 1e-5
    assert report.tokens.prompt == sum(len(query) + len(each) for each in others)
    assert report.tokens.prompt_computed <= len(query) + 32 + sum(len(each) for each in others)


def test_a_template_of_queries_and_documents_makes_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_decoder(folder)
    template = (
        "{{ instruction or 'Judge.' }}{% for m in messages %}{% if m.role == 'query' %}<Q>{{ m.content }}"
        "{% elif m.role == 'document' %}<D>{{ m.content }}{% endif %}{% endfor %}?"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    rows = [
        ("/score", {"text_1": "a river", "text_2": ["the Nile", "a fish"]}),
        ("/score", {"text_1": "a river", "text_2": "a fish", "instruction": "Be kind."}),
        ("/score", {"text_1": "a river", "text_2": "a fish", "max_tokens_per_doc": 3}),
    ]
    report, (two, kind), failed = run(folder, rows)
    assert [line["response"]["body"]["error"]["code"] for line in failed] == ["not_supported"]
    texts = ["Judge.<Q>a river<D>the Nile?", "Judge.<Q>a river<D>a fish?", "Be kind.<Q>a river<D>a fish?"]
    wanted = [sigmoid(logits(model, list(each))[0]) for each in Tokenizer.load(folder).encode_batch(texts)]
    got = [each["score"] for each in (*two["data"], *kind["data"])]
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 1e-5 and len(set(got)) == 3


def test_a_reward_is_that_of_the_whole_chat(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_decoder(folder, "llama")
    turns = [{"role": "user", "content": "name a river"}, {"role": "assistant", "content": "the Nile"}]
    rows = [("/pooling", {"messages": turns, "use_activation": False}), ("/classify", {"messages": turns})]
    rows.append(("/v1/chat/completions", {"messages": turns}))
    _, (raw, shown), failed = run(folder, rows)
    ids = list(Tokenizer.load(folder).encode("user: name a river\nassistant: the Nile\n"))
    reward = raw["data"][0]["data"][0]
    assert abs(reward - logits(model, ids)[0]) < 1e-4 and shown["data"][0]["probs"] == [sigmoid(reward)]
    assert [line["response"]["body"]["error"]["code"] for line in failed] == ["not_supported"]


def test_a_text_alone_has_the_bits_it_has_among_others(tmp_path: Path) -> None:
    luck = Random(9)
    for name, save in (("decoder", save_decoder), ("encoder", save_encoder)):
        folder = tmp_path / name / "model"
        folder.parent.mkdir()
        save(folder, labels=3)
        texts = [some_text(luck) for _ in range(40)]
        rows = [("/pooling", {"input": texts, "use_activation": False})]
        rows += [("/pooling", {"input": text, "use_activation": False}) for text in texts[::8]]
        _, (among, *_), _ = run(folder, rows)
        _, alone, _ = run(folder, rows[1:][::-1], restart=True)
        got = [each["data"][0]["data"] for each in alone[::-1]]
        assert got == [each["data"] for each in among["data"]][::8]


def test_a_head_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model", labels=3)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "id2label": {"0": "one"}}))
    with pytest.raises(ShoalError, match="classifier"):
        run(tmp_path / "model", [("/classify", {"input": "w1"})])


def test_vectors_over_robertas_layout_are_those_of_transformers(tmp_path: Path) -> None:
    folder, luck = tmp_path / "model", Random(3)
    model = save_embedder(folder)
    texts = [some_text(luck) for _ in range(9)]
    rows = [("/v1/embeddings", {"input": texts}), ("/score", {"text_1": texts[0], "text_2": texts})]
    _, (vectors, scored), _ = run(folder, rows)
    wanted = reference(model, [words("xlm-roberta").encode(text).ids for text in texts])
    got = torch.tensor([each["embedding"] for each in vectors["data"]], dtype=torch.float64)
    assert (got - wanted).abs().max() < 1e-5
    cosines = torch.tensor([each["score"] for each in scored["data"]], dtype=torch.float64)
    assert (cosines - wanted @ wanted[0]).abs().max() < 1e-5 and cosines[0] == pytest.approx(1)
