"""Log-likelihoods of given texts: what lm-evaluation-harness asks for and reads, equal to transformers'."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

import shoal
from shoal.jobs.report import Report
from shoal.text.checkpoint import EMBEDDED
from shoal.text.tokenizer import Tokenizer

NEAR = 1e-3
QUESTIONS = (
    "Sort: 3 1 2\n", "Add 17 and 25.\n", "Copy: the quick brown fox\n",
    "Is it good? Answer yes or no.\nThe soup was cold.",
    "The river runs slowly past a small white house where nobody has lived for many years, and the garden is full of "
    "apple trees that somebody planted before the war. Who lives there?",
)  # fmt: skip
CHOICES = (" yes", " no", " 1 2 3", " 42", " the quick brown fox", " nobody at all")


@cache
def judge() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, local_files_only=True)


@torch.inference_mode()
def likeliest(context: list[int], count: int) -> list[int]:
    """The tokens that follow where the best is taken each time."""
    tokens = list(context)
    for _ in range(count):
        tokens.append(int(judge()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


@cache
def cases() -> list[tuple[list[int], list[list[int]]]]:
    """Contexts with their choices, as token ids. The last choice is what the model itself would say."""
    tokenizer = Tokenizer.load(EMBEDDED)
    contexts = [list(tokenizer.encode(question)) for question in QUESTIONS]
    choices = [list(tokenizer.encode(choice, False)) for choice in CHOICES]
    return [(context, [*choices, likeliest(context, 4)]) for context in contexts]


@pytest.fixture(scope="module")
def expected() -> list[list[tuple[float, bool]]]:
    """Of each choice after its context: the sum of log-probabilities, and whether every token was the best."""
    found = []
    with torch.inference_mode():
        for context, choices in cases():
            found.append([])
            for choice in choices:
                logits = judge()(torch.tensor([context + choice])).logits[0].double().log_softmax(-1)
                rows = logits[len(context) - 1 : -1]
                total = rows[torch.arange(len(choice)), torch.tensor(choice)].sum().item()
                found[-1].append((total, rows.argmax(1).tolist() == choice))
    return found


def ask(path: Path, more: dict[str, Any]) -> tuple[list[list[dict[str, Any]]], Report]:
    """The choices' logprobs, by context; one row for each context, in a random order of rows."""
    order = Random(1).sample(range(len(QUESTIONS)), len(QUESTIONS))
    with (path / "in.jsonl").open("w") as file:
        for number in order:
            context, choices = cases()[number]
            body = {"prompt": [context + choice for choice in choices], "echo": True, "logprobs": 1, "temperature": 0}
            body |= {key: value(context) if callable(value) else value for key, value in more.items()}
            row = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    report = shoal.run(path / "in.jsonl", path / "out.jsonl", weights="fp32", threads=1)
    assert report.exit_code == 0 and report.problems() == []
    lines = {line["custom_id"]: line for line in map(json.loads, (path / "out.jsonl").read_text().splitlines())}
    found = [lines[f"q{number}"]["response"]["body"]["choices"] for number in range(len(QUESTIONS))]
    return [[choice["logprobs"] for choice in choices] for choices in found], report


def read_as_the_harness(logprobs: dict[str, Any], context: int) -> tuple[float, bool]:
    """One token more than the prompt was produced: it is left out."""
    values = logprobs["token_logprobs"][context:-1]
    tops = logprobs["top_logprobs"][context:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def compare(found: list[list[tuple[float, bool]]], expected: list[list[tuple[float, bool]]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for (total, best), (wanted, wanted_best) in zip(ours, theirs, strict=True):
            assert abs(total - wanted) < NEAR and best == wanted_best
        totals, wanteds = [t for t, _ in ours], [t for t, _ in theirs]
        assert totals.index(max(totals)) == wanteds.index(max(wanteds)), "the same choice wins"


def test_the_harness_reads_the_likelihoods_of_transformers(
    tmp_path: Path, expected: list[list[tuple[float, bool]]]
) -> None:
    found, _ = ask(tmp_path, {"max_tokens": 1, "seed": 1234})
    contexts = [len(context) for context, _ in cases()]
    compare(
        [[read_as_the_harness(each, n) for each in choices] for choices, n in zip(found, contexts, strict=True)],
        expected,
    )
    assert len({best for choices in expected for _, best in choices}) == 2, "some choices are greedy and some are not"


def test_a_context_is_computed_once_for_its_choices(tmp_path: Path, expected: list[list[tuple[float, bool]]]) -> None:
    found, report = ask(tmp_path, {"max_tokens": 0, "score_from": len})
    contexts = [len(context) for context, _ in cases()]
    results = []
    for choices, context in zip(found, contexts, strict=True):
        assert all(each["token_logprobs"][:context] == [None] * context for each in choices)
        ends = [
            {"token_logprobs": e["token_logprobs"] + [0.0], "top_logprobs": e["top_logprobs"] + [{}]} for e in choices
        ]
        results.append([read_as_the_harness(each, context) for each in ends])
    compare(results, expected)
    tokens = report.tokens
    assert tokens.prompt_computed == tokens.prompt_bound and tokens.prompt_recomputed == 0
    # the prompt's last position is not computed; a context is shared in blocks of 32
    whole = sum(len(context) // 32 * 32 for context, _ in cases())
    assert whole >= 32 and tokens.prompt_computed <= tokens.prompt - len(CHOICES) * whole


def test_a_position_that_is_not_there_cannot_be_scored_from(tmp_path: Path) -> None:
    bodies = [
        {"prompt": [5, 6, 7], "score_from": 3, "echo": True, "logprobs": 1},
        {"prompt": [5, 6, 7], "score_from": 2},
        {"prompt": [5, 6, 7], "score_from": 0, "echo": True, "logprobs": 1},
        {"prompt": [5, 6, 7], "score_from": 2, "echo": True, "logprobs": 1},
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "max_tokens": 1}}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = shoal.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", threads=1)
    failed = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert (
        report.rows.ok == 1
        and [line["response"]["body"]["error"]["param"] for line in failed][:2] == ["score_from"] * 2
    )
    assert [line["custom_id"] for line in failed] == ["r0", "r1", "r2"]
