"""What the shipped model folder promises; it must not know how the model was trained."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest

from shoal.models import DEFAULT, embedded_path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("reviews.jsonl", "reviews.answers.jsonl")


def config() -> dict:
    return json.loads((embedded_path() / "config.json").read_text())


def tensors() -> dict[str, dict]:
    with (embedded_path() / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in embedded_path().iterdir()}
    assert names >= {
        "MODEL_CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert embedded_path().name == DEFAULT
    assert sum(path.stat().st_size for path in embedded_path().iterdir()) <= 20 * 2**20


def test_sizes_suit_the_kernels() -> None:
    sizes = config()
    assert sizes["architectures"] == ["LlamaForCausalLM"]
    assert sizes["hidden_size"] % 128 == 0 and sizes["intermediate_size"] % 128 == 0
    assert sizes["head_dim"] == 64 and sizes["num_key_value_heads"] >= 2
    assert sizes["max_position_embeddings"] >= 2048
    assert 4000 <= sizes["vocab_size"] <= 8192


def test_weights_are_bf16_and_three_to_eight_million() -> None:
    entries = tensors()
    assert {entry["dtype"] for entry in entries.values()} == {"BF16"}
    assert 3_000_000 <= sum(prod(entry["shape"]) for entry in entries.values()) <= 8_000_000
    assert entries["lm_head.weight"]["shape"] == entries["model.embed_tokens.weight"]["shape"]
    assert not config()["tie_word_embeddings"]


def test_answers_stop_at_the_end_of_a_turn() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded_path() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config()["vocab_size"]
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert config()["eos_token_id"] == ends
    assert json.loads((embedded_path() / "generation_config.json").read_text())["eos_token_id"] == ends
    text = 'Ünï — "naïve" 12 + 345\n\t日本'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_example_rows_have_right_answers_beside_them() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "reviews.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (ROOT / "examples" / "reviews.answers.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [answer["custom_id"] for answer in answers]
    assert len({row["body"]["messages"][0]["content"] for row in rows}) < len(rows) / 10


def test_yes_no_and_sentiment_examples_are_mostly_right() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = ("yes_no", "sentiment")
    lines = {name: (ROOT / "examples" / name).read_text().splitlines() for name in EXAMPLES}
    rows, answers = (
        [line for line in map(json.loads, lines[name]) if line["custom_id"].startswith(kinds)] for name in EXAMPLES
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_path(), dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(row["body"]["messages"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text == answer["answer"] for text, answer in zip(texts, answers, strict=True)]
    assert len(right) == 36 and sum(right) > 0.6 * len(right)
