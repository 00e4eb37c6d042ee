"""A whole job whose rows name several adapters and none: each answered as by a model with its adapter merged in."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import merged, save_adapter
from byte_model import save_byte_model
from rich.console import Console

from shoal.build import build_engine
from shoal.client import InProcess
from shoal.core.config import EngineConfig
from shoal.core.errors import ModelError, StateError, UsageError
from shoal.jobs.options import JobOptions, Order
from shoal.jobs.run import run_job
from shoal.kernels import set_threads
from shoal.llm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
HEADS = ("Once there was a fish that swam alone, and then", "A shoal is a group of fish", "")


@dataclass(frozen=True)
class Models:
    """A base model, adapters of it by name, and models with each merged in."""

    base: Path
    adapters: dict[str, str]
    whole: dict[str, Path]  # with '' for the base


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    before = torch.get_num_threads()
    set_threads(1)
    root = tmp_path_factory.mktemp("models")
    model = save_byte_model(root / "base")
    adapters, whole = {}, {"": root / "base"}
    every = {"seed": 1}, {"seed": 2, "rank": 20, "targets": ("q_proj", "v_proj")}, {"seed": 3, "rank": 1, "alpha": 1}
    for name, how in zip(("fish", "bird", "stone"), every, strict=True):
        tensors = save_adapter(model, root / name, **how)  # type: ignore[arg-type]
        save_byte_model(root / f"whole-{name}")
        merged(model, root / name, tensors).save_pretrained(root / f"whole-{name}")
        adapters[name], whole[name] = str(root / name), root / f"whole-{name}"
    yield Models(root / "base", adapters, whole)
    set_threads(before)


def rows(count: int = 36) -> list[dict[str, Any]]:
    """Prompts behind common heads, in an order in which neighbours have different adapters; greedy and seeded."""
    luck = random.Random(7)
    found = []
    for i in range(count):
        body: dict[str, Any] = {
            "prompt": HEADS[i % 3] + f" {luck.randrange(5)}", "max_tokens": luck.randrange(3, 14),
            "n": 1 + (i % 5 == 0), "temperature": 0.9 * (i % 4 == 1), "return_token_ids": True,
            "ignore_eos": i % 3 > 0,
        }  # fmt: skip
        name = luck.choice(("fish", "bird", "stone", ""))
        if name:
            body["model"] = name
        found.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    return found


def answers(
    folder: Path, model: Path, lines: list[dict[str, Any]], adapters: dict[str, str],
    engine: dict[str, Any] | None = None, **options: Any,
) -> tuple[int, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Exit code, choices by custom_id, and errors by custom_id, of a job in this process."""
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = JobOptions(folder / "in.jsonl", folder / "out.jsonl", str(model), adapters, quiet=True, **options)
    settings = {"memory_bytes": 4_000_000, "threads": 1, **(engine or {})}
    built = build_engine(EngineConfig(str(model), adapters=adapters, **settings))
    try:
        code = run_job(asked, InProcess(built.engine), Console(file=io.StringIO()))
    finally:
        built.close()
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    path = folder / "out.errors.jsonl"
    failed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return (
        code,
        {each["custom_id"]: each["response"]["body"]["choices"] for each in found},
        {each["custom_id"]: each["response"]["body"]["error"] for each in failed},
    )


@pytest.fixture(scope="module")
def together(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The choices of all rows in one job."""
    code, found, failed = answers(tmp_path_factory.mktemp("jobs") / "all", models.base, rows(), models.adapters)
    assert (code, failed, len(found)) == (0, {}, len(rows()))
    return found


def test_a_mixed_job_answers_as_jobs_on_merged_models(models: Models, together: dict[str, Any], tmp_path: Path) -> None:
    unlike = 0
    for name, whole in models.whole.items():
        lines = [
            {**line, "body": {key: value for key, value in line["body"].items() if key != "model"}}
            for line in rows()
            if line["body"].get("model", "") == name
        ]
        code, found, _ = answers(tmp_path / f"job-{name}", whole, lines, {})
        assert code == 0 and found
        assert found == {id: together[id] for id in found}
        _, plain, _ = answers(tmp_path / f"plain-{name}", models.base, lines, {})
        unlike += plain != found
    assert unlike == 3, "the adapters change nothing"


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in another order": ({}, {"order": Order.INPUT}),
    "with little memory": ({"memory_bytes": 60_000, "block_size": 16}, {}),
    "in small steps": ({"step_tokens": 7, "max_sequences": 3}, {}),
    "without sharing": ({"reuse": False}, {}),
    "by a policy that steals": ({"policy": "adapter_policy:Thief", "step_tokens": 30}, {}),
    "on two threads": ({"threads": 2, "overlap": False}, {}),
}


@pytest.mark.parametrize("how", SETTINGS)
def test_a_mixed_job_is_equal_to_itself(how: str, models: Models, together: dict[str, Any], tmp_path: Path) -> None:
    engine, options = SETTINGS[how]
    assert answers(tmp_path / "job", models.base, rows(), models.adapters, engine, **options)[1] == together


def test_rows_do_not_depend_on_other_rows_or_adapters(models: Models, together: dict[str, Any], tmp_path: Path) -> None:
    some = [line for line in rows() if line["body"].get("model") == "bird"][::-1]
    found = answers(tmp_path / "some", models.base, some, {"bird": models.adapters["bird"]})[1]
    assert found == {line["custom_id"]: together[line["custom_id"]] for line in some}


def test_an_unknown_adapter_fails_its_row_alone(models: Models, together: dict[str, Any], tmp_path: Path) -> None:
    lines = rows()[:6]
    lines[2]["body"]["model"] = "fisch"
    code, found, failed = answers(tmp_path / "job", models.base, lines, models.adapters)
    assert code == 3 and failed.keys() == {"r2"} and failed["r2"]["code"] == "model_not_found"
    assert found == {f"r{i}": together[f"r{i}"] for i in (0, 1, 3, 4, 5)}


def test_a_job_under_another_adapter_is_another_job(models: Models, tmp_path: Path) -> None:
    lines = [line for line in rows() if line["body"].get("model", "fish") == "fish"][:3]
    job = tmp_path / "job"
    assert answers(job, models.base, lines, {"fish": models.adapters["fish"]})[0] == 0
    manifest = json.loads((job / "out.jsonl.shoal" / "manifest.json").read_text())
    assert manifest["adapters"].keys() == {"fish"} and len(manifest["adapters"]["fish"]) == 64
    with pytest.raises(StateError, match="adapters fish was"):
        answers(job, models.base, lines, {"fish": models.adapters["bird"]})


def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_done(models: Models, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(rows()[0]) + "\n")
    (tmp_path / "empty").mkdir()
    for adapters, kind, words in (
        ({"a": str(tmp_path / "empty")}, ModelError, "adapter a: .* has no adapter_config.json"),
        ({str(models.base): models.adapters["fish"]}, UsageError, "the model's own name"),
    ):
        options = JobOptions(tmp_path / "in.jsonl", tmp_path / "out.jsonl", str(models.base), adapters, quiet=True)
        with pytest.raises(kind, match=words):
            run_job(options, console=Console(file=io.StringIO()))
    assert not (tmp_path / "out.jsonl.shoal").exists()


def test_the_command_takes_adapters_by_name(models: Models, together: dict[str, Any], tmp_path: Path) -> None:
    lines = rows()[:8]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [word for name, folder in models.adapters.items() for word in ("--adapter", f"{name}={folder}")]
    command = [sys.executable, "-m", "shoal", "run", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o.jsonl")]
    command += ["--model", str(models.base), "--threads", "1", "--memory", "4MB", "--quiet", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert {each["custom_id"]: each["response"]["body"]["choices"] for each in found} == {
        f"r{i}": together[f"r{i}"] for i in range(8)
    }
    named = [line["body"].get("model", str(models.base)) for line in lines]
    assert [each["response"]["body"]["model"] for each in found] == named


# -- LLM ----------------------------------------------------------------------------------------------


class LoRARequest:
    """As vLLM's."""

    lora_name, lora_int_id, lora_path = "bird", 1, "nowhere"


def test_prompts_name_adapters_one_by_one_or_all_alike(models: Models) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = [HEADS[0]] * 4
    expected = {}
    for name, whole in models.whole.items():
        made = LLM(str(whole), threads=1)
        expected[name] = made.generate(HEADS[0], greedy, use_tqdm=False)[0].outputs[0].token_ids
        made.close()
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    llm = LLM(str(models.base), threads=1, adapters=models.adapters)
    names = ["fish", None, LoRARequest(), "stone"]
    outputs = llm.generate(prompts, greedy, use_tqdm=False, lora_request=names)
    assert [each.outputs[0].token_ids for each in outputs] == [expected[n] for n in ("fish", "", "bird", "stone")]
    assert [each.lora_request for each in outputs] == ["fish", None, "bird", "stone"]
    both = llm.generate(prompts[:2], greedy, use_tqdm=False, lora_request="fish")
    assert [each.outputs[0].token_ids for each in both] == [expected["fish"]] * 2
    one, wrong = llm.generate(prompts[:2], greedy, use_tqdm=False, lora_request=["", "fisch"])
    assert one.outputs[0].token_ids == expected[""]
    assert wrong.outputs[0].finish_reason == "error" and "fish, bird, stone" in str(wrong.error)
    for bad in (["fish"], 5):
        with pytest.raises(UsageError, match="lora_request"):
            llm.generate(prompts, greedy, use_tqdm=False, lora_request=bad)
    llm.close()
