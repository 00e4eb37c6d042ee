"""Rows for heads through the whole job: shapes, order, ranks; what cannot be answered fails alone and says why."""

from __future__ import annotations

import base64
import json
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from echo_job import EchoJob, Watched
from encoder_folder import CONTEXT, WORDS, write_encoder
from hypothesis import given
from hypothesis import strategies as st
from test_embeddings import embedding, encoder_backend, some_text
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shoal.core.errors import ModelError, RowError
from shoal.core.types import TOKEN
from shoal.text.heads import Head, read_head
from shoal.text.joint import Joint, read_joint

CLASSIFIER = {"architectures": ["BertForSequenceClassification"]}
Job = Callable[..., EchoJob]


def row(number: int, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})


def change(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def labelled(count: int, problem: str | None) -> dict[str, Any]:
    labels = {str(n): f"kind {n}" for n in range(count)}
    return {**CLASSIFIER, "id2label": labels, "problem_type": problem, "max_position_embeddings": CONTEXT}


@pytest.fixture
def heads(job: Job, tmp_path: Path) -> Callable[..., EchoJob]:
    """Makes jobs over an encoder's classifier with so many labels."""
    folder = write_encoder(tmp_path / "model")

    def make(labels: int, rows: Sequence[str], problem: str | None = "regression", **options: Any) -> EchoJob:
        return job(rows, model=str(change(folder, **labelled(labels, problem))), **options)

    return make


def bodies(made: EchoJob) -> list[dict[str, Any]]:
    return [line["response"]["body"] for line in made.answers()]


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def test_answers_have_vllms_shapes(heads: Job) -> None:
    rows = [
        row(1, "/v1/score", text_1="one", text_2=["two", "three four"], model="any"),
        row(2, "/v1/rerank", query="one", documents=["two", "three four"]),
        row(3, "/v1/classify", input=["one", "two"]),
        row(4, "/v1/pooling", input="one", use_activation=False),
        row(5, "/pooling", input="one", use_activation=False, encoding_format="base64"),
    ]
    made = heads(1, rows)
    assert made.run(encoder_backend()) == 0
    score, rank, classes, raw, packed = bodies(made)
    assert set(score) == {"id", "object", "created", "model", "data", "usage"} and score["object"] == "list"
    assert [set(each) for each in score["data"]] == [{"index", "object", "score"}] * 2 and score["model"] == "any"
    assert set(rank) == {"id", "model", "usage", "results"}
    assert [set(each) for each in rank["results"]] == [{"index", "document", "relevance_score"}] * 2
    assert score["usage"] == rank["usage"] == {"prompt_tokens": 5 + 6, "total_tokens": 5 + 6}
    assert [set(each) for each in classes["data"]] == [{"index", "label", "probs", "num_classes"}] * 2
    assert classes["data"][0]["label"] == "kind 0" and classes["data"][0]["num_classes"] == len(raw["data"][0]["data"])
    assert raw["data"][0]["object"] == "pooling"
    data = base64.b64decode(packed["data"][0]["data"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == raw["data"][0]["data"]
    assert [each["id"].split("-")[0] for each in (score, rank, classes, raw)] == "score score classify pooling".split()


def test_ranks_are_scores_in_order_whatever_stands_beside_them(heads: Job) -> None:
    luck = Random(8)
    query, documents = some_text(luck, 4), [some_text(luck, 6) for _ in range(30)]
    documents += documents[:5]
    rows = [row(1, "/score", queries=query, documents=documents)]
    rows += [row(2 + top, "/rerank", query=query, documents=documents, top_n=top) for top in (0, 1, 7, 99)]
    rows += [row(200 + i, "/score", queries=query, documents=each) for i, each in enumerate(documents)]
    made = heads(1, rows)
    assert made.run(encoder_backend()) == 0
    scored, *ranked = bodies(made)[:5]
    scores = [each["score"] for each in scored["data"]]
    assert len(set(scores)) > 20 and len(set(scores)) < len(scores), "documents of all ranks, and equal ones"
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for top, body in zip((35, 1, 7, 35), ranked, strict=True):
        assert [each["index"] for each in body["results"]] == order[:top]
        assert [each["relevance_score"] for each in body["results"]] == [scores[i] for i in order[:top]]
    assert [body["data"][0]["score"] for body in bodies(made)[5:]] == scores, "alone as among others"


def test_a_second_texts_words_are_its_own_to_an_encoder_that_tells_them_apart(heads: Job) -> None:
    made, seen = heads(1, [row(1, "/score", text_1="one two", text_2="three")]), Watched(encoder_backend(), lambda _: 0)
    assert made.run(seen) == 0
    ids, size = [WORDS.index(word) for word in ("[CLS]", "one", "two", "[SEP]", "three", "[SEP]")], len(WORDS)
    assert [list(request.prompt) for request in seen.submitted] == [ids[:4] + [id + size for id in ids[4:]]]


@pytest.mark.parametrize(
    ("labels", "bad", "code", "word"),
    [
        (3, row(1, "/score", text_1="one", text_2="two"), "not_supported", "one number"),
        (1, row(1, "/v1/embeddings", input="one"), "not_supported", "labels"),
        (1, row(1, "/v1/completions", prompt="one"), "not_supported", "no text"),
        (1, row(1, "/pooling", input="one", task="embed"), "not_supported", "labels"),
        (1, row(1, "/pooling", input="one", dimensions=3), "not_supported", "1 numbers"),
        (1, row(1, "/classify"), "missing_field", "input"),
        (1, row(1, "/classify", input="one", messages=[{"role": "user", "content": "one"}]), "invalid_request", "keep"),
        (1, row(1, "/classify", messages=[{"role": "user", "content": "one"}]), "no_chat_template", "template"),
        (1, row(1, "/classify", input="one", add_generation_prompt=True), "invalid_request", "messages"),
        (1, row(1, "/classify", input="one", encoding_format="float"), "unknown_field", "not a field of this url"),
        (1, row(1, "/classify", input="one", temperature=0), "unknown_field", "not a field of this url"),
        (1, row(1, "/classify", input=[]), "invalid_request", "empty"),
        (1, row(1, "/score", text_1="one"), "missing_field", "text_1 and text_2"),
        (1, row(1, "/score"), "missing_field", "queries and documents"),
        (1, row(1, "/score", text_1="one", documents="two"), "invalid_request", "belong together"),
        (1, row(1, "/score", text_1=["one", "two"], text_2=["one"] * 3), "invalid_request", "one for each"),
        (1, row(1, "/score", text_1="one", text_2=[]), "invalid_request", "empty"),
        (1, row(1, "/score", text_1="one", text_2=[3]), "invalid_request", "text_2"),
        (1, row(1, "/score", text_1="one", text_2="two", add_special_tokens=False), "unknown_field", "not a field"),
        (1, row(1, "/score", text_1="one", text_2="two", instruction="x"), "not_supported", "instruction"),
        (1, row(1, "/rerank", query="one"), "missing_field", "documents"),
        (1, row(1, "/rerank", documents=["one"]), "missing_field", "query"),
        (1, row(1, "/rerank", query="one", documents=[1]), "invalid_request", "documents"),
        (1, row(1, "/rerank", query="one", documents=["two"], top_n=-1), "invalid_request", "top_n"),
        (1, row(1, "/rerank", query="one", documents=["two"], text_1="x"), "unknown_field", "text_1"),
        (1, row(1, "/rerank", query="one " * CONTEXT, documents=["two"]), "context_length_exceeded", f"{CONTEXT}"),
        (1, row(1, "/rerank", query="one", documents=["two"], truncate_prompt_tokens=2), "invalid_request", "special"),
        (1, row(1, "/scores", text_1="one", text_2="two"), "url_not_supported", "/v1/score"),
    ],
)
def test_what_cannot_be_answered_fails_its_own_row(heads: Job, labels: int, bad: str, code: str, word: str) -> None:
    made = heads(labels, [bad, row(2, "/classify", input="two", user="me")])
    assert made.run(encoder_backend()) == 3
    assert made.codes() == [code] and [line["custom_id"] for line in made.answers()] == ["r2"]
    assert word in made.failures()[0]["response"]["body"]["error"]["message"]


def test_models_without_heads_say_so(job: Job) -> None:
    made = job(
        [row(1, "/classify", input="one"), row(2, "/score", text_1="a", text_2="b"), row(3, "/pooling", input="")]
    )
    assert made.run() == 3 and made.codes() == ["not_supported"] * 3


def test_a_score_of_two_embeddings_is_their_cosine(job: Job, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model")
    texts = ["one two", "three", "one two"]
    rows = [embedding(1, texts), row(2, "/score", text_1="one two", text_2=texts), row(3, "/pooling", input=texts)]
    rows += [row(4, "/rerank", query="one two", documents=texts), row(5, "/classify", input="one")]
    made = job(rows, model=str(folder))
    assert made.run(encoder_backend()) == 3 and made.codes() == ["not_supported"]
    vectors, scored, pooled, ranked = bodies(made)
    first, second, _ = (each["embedding"] for each in vectors["data"])
    cosine = sum(a * b for a, b in zip(first, second, strict=True)) / math.hypot(*first) / math.hypot(*second)
    assert [each["score"] for each in scored["data"]] == pytest.approx([1, cosine, 1])
    assert scored["usage"]["prompt_tokens"] == 4 + 4 + 3 + 4, "each text once"
    assert [each["data"] for each in pooled["data"]] == [each["embedding"] for each in vectors["data"]]
    scores = [each["score"] for each in scored["data"]]
    assert [each["index"] for each in ranked["results"]] == sorted(range(3), key=lambda i: (-scores[i], i))


def test_notes_beside_a_body_may_be_called_like_fields_of_pairs(heads: Job) -> None:
    line = {**json.loads(row(1, "/classify", input="one")), "query": "mine", "documents": 3, "input": "x"}
    made = heads(1, [json.dumps(line)])
    assert made.run(encoder_backend()) == 0


def test_defaults_for_all_rows_hold_where_they_mean_something(heads: Job) -> None:
    rows = [row(1, "/classify", input="one"), row(2, "/classify", input="one", use_activation=True)]
    made = heads(1, rows, problem=None, body={"use_activation": False, "temperature": 0.0})
    assert made.run(encoder_backend()) == 0
    raw, shown = (body["data"][0]["probs"] for body in bodies(made))
    assert shown == [sigmoid(number) for number in raw] != raw


@pytest.mark.parametrize(
    ("fields", "labels", "activation"),
    [
        ({"id2label": {"0": "x"}}, ("x",), "sigmoid"),
        ({}, ("LABEL_0", "LABEL_1"), "softmax"),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2"), "softmax"),
        ({"id2label": {"0": "x"}, "problem_type": "regression"}, ("x",), "none"),
        ({"problem_type": "multi_label_classification"}, ("LABEL_0", "LABEL_1"), "sigmoid"),
        ({"id2label": {"0": "x"}, "problem_type": "single_label_classification"}, ("x",), "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, None, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, None, "softmax"),
    ],
)
def test_what_a_config_says_of_a_head(fields: dict[str, Any], labels: tuple[str, ...] | None, activation: str) -> None:
    found = read_head({**CLASSIFIER, **fields})
    assert found is not None and found.activation == activation and found.labels == (labels or found.labels)
    assert read_head({"architectures": ["BertModel"], **fields}) is None


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match="Tanh"):
        read_head({**CLASSIFIER, "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}})


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9))
def test_activated_numbers_are_shares_in_the_order_of_the_raw_ones(numbers: list[float]) -> None:
    for activation in ("sigmoid", "softmax"):
        head = Head(tuple(map(str, numbers)), activation)  # type: ignore[arg-type]
        shares = head.values(numbers)
        assert all(0 <= share <= 1 for share in shares) and head.values(numbers, False) == numbers
        assert activation == "sigmoid" or sum(shares) == pytest.approx(1)
        ranked = sorted(range(len(numbers)), key=lambda i: numbers[i])
        assert [shares[i] for i in ranked] == sorted(shares)


TEMPLATES = ["<a> $A <b> $B:1 <b>:1", "<a> $A <b> <b> $B <b>", "$A $B", "<a> $A <a> $B:1", "$A:0 <b>:1 $B:1"]


@given(st.sampled_from(TEMPLATES), st.lists(st.integers(2, 9), max_size=9), st.lists(st.integers(2, 9), max_size=9),
       st.integers(4, 25))  # fmt: skip
def test_pairs_are_joined_and_cut_as_the_tokenizer_library_does(
    template: str, first: list[int], second: list[int], most: int
) -> None:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(10)} | {"<a>": 10, "<b>": 11}, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=template, special_tokens=[("<a>", 10), ("<b>", 11)]
    )
    joint = read_joint(tokenizer)
    assert joint is not None
    tokenizer.enable_truncation(most)
    wanted = tokenizer.encode(" ".join(map(str, first)), " ".join(map(str, second)))
    tokens, begin = joint.join(array(TOKEN, first), array(TOKEN, second), most)
    assert list(tokens) == wanted.ids
    assert [int(place >= begin) for place in range(len(tokens))] == wanted.type_ids
    uncut, _ = joint.join(array(TOKEN, first), array(TOKEN, second))
    assert len(uncut) == len(first) + len(second) + joint.num_special


def test_no_room_for_special_tokens_is_the_rows_own_failure() -> None:
    joint = Joint(array(TOKEN, [1]), array(TOKEN, [2]), array(TOKEN, [2]), -1)
    with pytest.raises(RowError, match="3 special tokens"):
        joint.join(array(TOKEN), array(TOKEN), 2)
