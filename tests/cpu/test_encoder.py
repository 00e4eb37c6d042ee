"""Encoders equal transformers, whatever stands beside a text in a step, and every text comes back once."""

from __future__ import annotations

import base64
import json
from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from encoders import minilm, reference, save_encoder, write_pooling

import shoal
from shoal.build import BuiltEngine, build_engine
from shoal.core.config import EngineConfig
from shoal.core.errors import ModelError, UsageError
from shoal.core.types import TOKEN, Answer, Finish, Output, Request, Sampling

VECTOR = {"sampling": Sampling(max_tokens=0), "answer": Answer.VECTOR}


def build(folder: Path, **config: Any) -> BuiltEngine:
    return build_engine(EngineConfig(**{"model": str(folder), "threads": 1, **config}))


def some_prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    luck = Random(seed)
    return [[luck.randrange(150) for _ in range(luck.randrange(1, longest + 1))] for _ in range(count)]


def encode(built: BuiltEngine, prompts: list[list[int]], **request: Any) -> list[Output]:
    """Every prompt's last news, in their order; the engine is closed."""
    for number, prompt in enumerate(prompts):
        asked = Request(str(number), array(TOKEN, prompt), index=number, **{**VECTOR, **request})
        assert built.engine.add(asked) is None
    found: dict[str, Output] = {}
    while built.engine.busy:
        for output in built.engine.step():
            assert output.finish is not None and output.id not in found, output
            found[output.id] = output
        scheduler = built.engine.scheduler
        scheduler.kv.audit(scheduler.live())
    built.close()
    return [found[str(number)] for number in range(len(prompts))]


def vectors(outputs: list[Output]) -> torch.Tensor:
    assert all(output.finish is Finish.LENGTH and output.vector is not None for output in outputs), outputs
    return torch.tensor([list(output.vector or ()) for output in outputs], dtype=torch.float64)


@pytest.mark.parametrize("kernels", ["auto", "ref"])
@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_transformers(tmp_path: Path, kernels: str, kind: str, normalize: bool) -> None:
    model = save_encoder(tmp_path, kind, normalize)
    prompts = some_prompts(24, 80)
    expected = reference(model, prompts, kind, normalize)
    got = vectors(encode(build(tmp_path, kernels=kernels, step_tokens=200), prompts))
    assert (got - expected).abs().max() < 1e-5
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 1e-3, "the texts must differ"


@pytest.mark.parametrize("kernels", ["auto", "ref"])
def test_company_order_and_threads_change_no_bit(tmp_path: Path, kernels: str) -> None:
    save_encoder(tmp_path)
    prompts = some_prompts(40, 80)
    alone = vectors(encode(build(tmp_path, kernels=kernels, max_sequences=1), prompts))
    mixed = [Random(2).sample(range(40), 40), sorted(range(40), key=lambda i: len(prompts[i])), list(range(40))]
    for threads, order in enumerate(mixed, 1):
        config = {"threads": min(threads, 2), "step_tokens": 100 * threads, "overlap": threads != 2}
        got = vectors(encode(build(tmp_path, kernels=kernels, **config), [prompts[i] for i in order]))
        assert torch.equal(got, alone[order])


def test_sixteen_bits_are_near(tmp_path: Path) -> None:
    model = save_encoder(tmp_path)
    prompts = some_prompts(10, 60)
    got = vectors(encode(build(tmp_path, weights="bf16"), prompts))
    assert 1e-5 < (got - reference(model, prompts)).abs().max() < 0.05


def test_every_step_has_whole_texts_within_its_budget(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    built = build(tmp_path, step_tokens=90, max_sequences=7)
    steps: list[list[int]] = []
    submit = built.runner.submit

    def watch(step: Any) -> Any:
        steps.append([len(part.tokens) for part in step.slices])
        return submit(step)

    built.runner.submit = watch  # type: ignore[method-assign]
    prompts = some_prompts(100, 80)
    encode(built, prompts)
    assert sorted(n for step in steps for n in step) == sorted(map(len, prompts))
    assert all(sum(step) <= 90 and len(step) <= 7 for step in steps)
    assert len(steps) < 80, "texts are not packed"


def test_what_is_no_text_for_an_encoder_fails_alone(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    built = build(tmp_path)
    wrong = {
        "outside": Request("outside", array(TOKEN, [3, 2 * 150]), **VECTOR),
        "asks for text": Request("asks for text", array(TOKEN, [3, 4]), Sampling(max_tokens=2)),
        "adapted": Request("adapted", array(TOKEN, [3, 4]), adapter="fish", **VECTOR),
    }
    good = Request("good", array(TOKEN, [3, 4]), **VECTOR)
    for request in (*wrong.values(), good):
        assert built.engine.add(request) is None
    refused = built.engine.add(Request("long", array(TOKEN, [1] * 81), **VECTOR))
    assert refused is not None and refused.finish is Finish.REJECT and "81 tokens" in refused.error
    found = {}
    while built.engine.busy:
        found |= {output.id: output for output in built.engine.step()}
    built.close()
    assert found["good"].vector is not None and found["good"].finish is Finish.LENGTH
    assert {id: found[id].finish for id in wrong} == dict.fromkeys(wrong, Finish.ERROR)
    words = {"outside": "outside the model's vocabulary", "asks for text": "no text", "adapted": "fish"}
    assert all(word in found[id].error for id, word in words.items())


def test_a_checkpoint_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, word in (
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"num_attention_heads": 5}, "attention heads"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "not part of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ModelError, match=word):
            build(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good))
    with pytest.raises(UsageError, match="policy"):
        build(tmp_path, policy="shoal.sched.policy:Policy")
    write_pooling(tmp_path, "max")
    with pytest.raises(ModelError, match="pooling by nothing"):
        build(tmp_path)


def test_a_trained_encoder_has_the_vectors_of_transformers() -> None:
    folder = minilm()
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    luck = Random(3)
    prompts = [[101, *(luck.randrange(1000, 30_000) for _ in range(n)), 102] for n in (1, 3, 30, 31, 100, 254)]
    got = vectors(encode(build(folder), prompts))
    assert (got - reference(model, prompts)).abs().max() < 1e-5


def test_a_job_over_a_trained_encoder_has_the_vectors_of_transformers(tmp_path: Path) -> None:
    folder = minilm()
    import transformers

    words = "the river runs slowly past a small white house where nobody has lived for many years".split()
    texts = [" ".join(words[:n]) for n in range(1, len(words))] + [" ".join(words * 40)]
    rows = [
        {"input": text, "encoding_format": kind, "truncate_prompt_tokens": -1}
        for text in texts
        for kind in ("float", "base64")
    ]
    rows += [{"input": texts}, {"input": " ".join(words * 40)}]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": b} for i, b in enumerate(rows)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = shoal.run(source, out, model=str(folder), threads=1)
    assert report.exit_code == 3 and report.problems() == []
    failed = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in failed] == [f"r{len(rows) - 2}", f"r{len(rows) - 1}"]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["custom_id"] for line in answers] == [f"r{i}" for i in range(len(rows) - 2)]
    given = [line["response"]["body"]["data"][0]["embedding"] for line in answers]
    packed = [list(array("f", base64.b64decode(each))) for each in given[1::2]]
    assert given[::2] == packed
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    assert (torch.tensor(packed, dtype=torch.float64) - reference(model, ids)).abs().max() < 1e-5
    assert report.tokens.prompt_computed == sum(map(len, ids))
