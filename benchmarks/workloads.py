"""The inputs that proofs share: GSM8K and BBH prompts with a real tokenizer, W1 to W4, random hierarchies.

It knows where the data lies beside the repository; it must not know what is proved with it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import SHARED

PROMPTS = SHARED / "data" / "prompts"
QWEN2 = SHARED / "data" / "tokenizers" / "qwen2"


def words_only_model(folder: Path, context: int = 32768) -> Path:
    """A model folder with the Qwen2 tokenizer and no weights: enough for everything that computes no tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in QWEN2.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    config = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": context, "eos_token_id": 151645}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gsm8k(shots: int = 8) -> list[str]:
    """The 1,319 test questions behind one prefix of worked examples."""

    examples = _gsm8k("train.jsonl.gz")[:shots]
    head = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in examples)
    return [f"{head}Question: {r['question']}\nAnswer:" for r in _gsm8k("test.jsonl.gz")]


def gsm8k_answers() -> list[str]:
    """What the data set itself answers to those questions, step by step."""
    return [f" {r['answer']}" for r in _gsm8k("test.jsonl.gz")]


def _gsm8k(name: str) -> list[dict[str, str]]:
    with gzip.open(PROMPTS / "gsm8k" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bbh() -> list[str]:
    """All examples of the 27 tasks behind their chain-of-thought prompts, tasks in name order."""
    found = []
    for path in sorted((PROMPTS / "bbh").glob("*.json")):
        text = (PROMPTS / "bbh" / "cot-prompts" / f"{path.stem}.txt").read_text(encoding="utf-8")
        head = text.split("-----\n", 1)[-1].strip()
        for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
            found.append(f"{head}\n\nQ: {example['input']}\nA: Let's think step by step.\n")
    return found


def mmlu(shots: int = 5) -> list[str]:
    """The test questions of all subjects, each behind its subject's own worked examples; subjects in name order."""
    heads: dict[str, str] = {}
    with (PROMPTS / "mmlu" / "dev.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            name = row["subject"]
            head = heads.get(name, f"Multiple choice questions about {name.replace('_', ' ')}, with answers.\n\n")
            if head.count("\nAnswer: ") < shots:
                heads[name] = f"{head}{_choices(row)} {'ABCD'[int(row['answer'])]}\n\n"
    found = []
    for part in ("test_1of2.jsonl.gz", "test_2of2.jsonl.gz"):
        with gzip.open(PROMPTS / "mmlu" / part, "rt", encoding="utf-8") as file:
            found += [(row["subject"], heads[row["subject"]] + _choices(row)) for row in map(json.loads, file)]
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def _choices(row: dict[str, Any]) -> str:
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}\n{choices}Answer:"


def paragraphs(questions: int = 6) -> list[str]:
    """Paragraphs of Natural Questions, each with its own question and those of the next ones."""
    with gzip.open(PROMPTS / "rag" / "nq-open-oracle.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for number, row in enumerate(rows[:-questions]):
        first = f"{row['ctxs'][0]['title']}\n{row['ctxs'][0]['text']}\n\n"
        found += [f"{first}Question: {each['question']}?\nAnswer:" for each in rows[number : number + questions]]
    return found


def bench(name: str, scale: float = 1.0) -> list[tuple[list[int], int]]:
    """(prompt tokens, output tokens) of workload W1, W2, W3 or W4, in its shuffled order."""
    spec = importlib.util.spec_from_file_location("shared_workloads", SHARED / "bench" / "workloads.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make(name, scale=scale)
    return [(request["prompt"], request["max_tokens"]) for request in made["requests"]]


def hierarchy(seed: int, count: int) -> list[tuple[list[int], int]]:
    """Random prompts that branch at any depth; some are equal, some are prefixes of others."""
    luck = random.Random(seed)
    pool: list[list[int]] = [[luck.randrange(300, 30000) for _ in range(luck.randrange(1, 400))]]
    for _ in range(count - 1):
        base = luck.choice(pool)
        cut = luck.choice([len(base), luck.randrange(1, len(base) + 1)])
        pool.append(base[:cut] + [luck.randrange(300, 30000) for _ in range(luck.choice([0, 1, 5, 60, 200]))])
    luck.shuffle(pool)
    return [(prompt, luck.randrange(1, 40)) for prompt in pool]


def write_rows(path: Path, rows: Iterable[tuple[list[int] | str, int]], **more: Any) -> Path:
    """A batch file of completions with exact output lengths."""
    with path.open("w", encoding="utf-8") as file:
        for i, (prompt, length) in enumerate(rows):
            body = {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, **more}
            line = {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path
