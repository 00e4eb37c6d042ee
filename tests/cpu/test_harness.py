"""Shoal as a model of lm-evaluation-harness says what the harness's own `hf` backend says of the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.core.errors import ShoalError
from shoal.text.checkpoint import EMBEDDED

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'shoal[harness]'")

NEAR = 1e-3
LIMIT = 60  # tokens of an input: so few that long texts are cut
CONTEXTS = ("", "Sort: 3 1 2\n", "Is it good? Answer yes or no. ", "Copy: the quick brown fox\nAnswer: ", "word " * 100)
CHOICES = (" yes", " no", "1 2 3", " the quick brown fox")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from shoal.ext.lm_eval import ShoalLM

    folder = str(tmp_path_factory.mktemp("jobs"))
    return ShoalLM(str(EMBEDDED), weights="fp32", max_length=LIMIT, folder=folder, threads=1, memory="64MB")


@pytest.fixture(scope="module")
def theirs() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(EMBEDDED), dtype="float32", max_length=LIMIT, device="cpu", batch_size=4)


def test_likelihoods_of_choices(ours: Any, theirs: Any) -> None:
    asked = instances("loglikelihood", [(context, choice) for context in CONTEXTS for choice in CHOICES])
    for mine, yours in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert abs(mine[0] - yours[0]) < NEAR and mine[1] == yours[1]


def test_likelihoods_of_whole_texts(ours: Any, theirs: Any) -> None:
    asked = instances("loglikelihood_rolling", [("A short one.",), ("The river runs slowly past a house. " * 30,)])
    for mine, yours in zip(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), strict=True):
        assert abs(mine - yours) < NEAR * max(1.0, abs(yours) / 100)


def test_answers_up_to_a_stop(ours: Any, theirs: Any) -> None:
    wish = {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(context, dict(wish)) for context in CONTEXTS[1:4]])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_it_goes_on_with_what_it_has_and_no_row_is_missing_in_silence(ours: Any) -> None:
    asked = instances("loglikelihood", [(CONTEXTS[1], choice) for choice in CHOICES])
    first = ours.loglikelihood(asked)
    reports = {path: path.stat().st_mtime_ns for path in Path(ours._folder).rglob("report.json")}
    assert ours.loglikelihood(asked) == first
    assert reports == {path: path.stat().st_mtime_ns for path in Path(ours._folder).rglob("report.json")}
    with pytest.raises(ShoalError, match=r"1 of 1 rows have no answer \(line 1 of .*unknown_field"):
        ours.generate_until(instances("generate_until", [("Add 1 and 2.", {"no_such_wish": 1, "max_gen_toks": 4})]))
    rows = [json.loads(path.read_text().splitlines()[0]) for path in Path(ours._folder).glob("likelihoods*.in.jsonl")]
    assert any(len(row["body"]["prompt"]) == len(CHOICES) for row in rows), "choices share a row, and so their context"
