"""lm-evaluation-harness through Shoal against its own `hf` backend: the same likelihoods and the same accuracy.

Multiple-choice tasks made here from MMLU and BIG-Bench Hard of the shared data, scored in float32 by both. It knows the
harness's command line and what it writes; it must not know how either backend computes. SHOAL_PEER_LMEVAL is a python
that has lm-eval and Shoal's dependencies, and the compiled extension must stand beside the sources. Without that
python, or without the shared data, there is nothing to compare.

    SHOAL_PEER_LMEVAL=…/bin/python python -m benchmarks.prove_harness [--questions 100]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import ROOT, SHARED, write_result

PROVES = ("shoal",)
PYTHON = "SHOAL_PEER_LMEVAL"
NEAR = 1e-3
PROMPTS = SHARED / "data" / "prompts"
EMBEDDED = ROOT / "shoal" / "models" / "minnow"
MODELS = {"minnow": EMBEDDED, "stories260K": SHARED / "data" / "models" / "stories260K" / "hf"}
CONTEXT = {"minnow": 2047, "stories260K": 511}  # tokens of an input: one fewer than there are positions to hold it
LETTERS = "ABCD"
SHOTS = {"minnow": 5, "stories260K": 0}  # questions with their answers before each, in the task of letters


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    yield from map(json.loads, filter(None, text.split("\n")))  # a text may hold other ends of lines


def shown(question: dict[str, Any], answer: str) -> str:
    """A question with its lettered choices."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question["choices"], strict=True))
    return f"{question['question']}\n{choices}\nAnswer:{answer}"


def make_tasks(folder: Path, questions: int, shots: int) -> dict[str, Path]:
    """The tasks' rows, by name: each with its context, its choices and the right one."""
    rng = Random(1)
    mmlu = [row for part in ("1of2", "2of2") for row in lines_of(PROMPTS / "mmlu" / f"test_{part}.jsonl.gz")]
    before: dict[str, list[str]] = {}
    for row in lines_of(PROMPTS / "mmlu" / "dev.jsonl"):
        before.setdefault(row["subject"], []).append(shown(row, f" {LETTERS[int(row['answer'])]}"))
    found: dict[str, list[dict[str, Any]]] = {"letters": [], "texts": [], "yes_or_no": []}
    for row in rng.sample(mmlu, questions):
        context = "\n\n".join([*before[row["subject"]][:shots], shown(row, "")])
        gold = int(row["answer"])
        found["letters"].append({"context": context, "choices": list(LETTERS), "gold": gold})
        found["texts"].append({"context": f"{row['question']}\nAnswer:", "choices": row["choices"], "gold": gold})
    bbh = json.loads((PROMPTS / "bbh" / "navigate.json").read_text())["examples"]
    for row in rng.sample(bbh, questions):
        choices = ["Yes", "No"]
        gold = choices.index(row["target"])
        found["yes_or_no"].append({"context": f"{row['input']}\nAnswer:", "choices": choices, "gold": gold})
    for name, rows in found.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")},
            "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return {name: folder / f"{name}.jsonl" for name in found}


def evaluate(python: str, folder: Path, tasks: list[str], backend: str, model: Path, context: int) -> dict[str, Any]:
    """What the harness finds, by task: the accuracy, and the log-likelihoods of every choice."""
    out = folder / f"{backend}-{model.parent.name}-{model.name}"
    words = {
        "hf": ["lm_eval", f"pretrained={model},dtype=float32,max_length={context}"],
        "shoal": ["shoal.ext.lm_eval", f"pretrained={model},weights=fp32,max_length={context}"],
    }
    module, arguments = words[backend]
    command = [
        python, "-m", module, "run", "--model", backend, "--model_args", arguments, "--tasks", *tasks, "--include_path",
        str(folder), "--output_path", str(out), "--log_samples", "--device", "cpu", "--batch_size", "8",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{backend} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    seconds = time.monotonic() - began
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    found: dict[str, Any] = {"seconds": round(seconds, 1)}
    for task in tasks:
        samples = sorted(lines_of(next(out.rglob(f"samples_{task}_*.jsonl"))), key=lambda sample: sample["doc_id"])
        scores = [[tuple(map(str, resps[0])) for resps in sample["resps"]] for sample in samples]
        found[task] = {"scores": scores, **{name: results[task][f"{name},none"] for name in ("acc", "acc_norm")}}
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far one task's results are from each other."""
    pairs = [
        (mine, yours)
        for here, there in zip(ours["scores"], theirs["scores"], strict=True)
        for mine, yours in zip(here, there, strict=True)
    ]
    far = max(abs(float(mine[0]) - float(yours[0])) for mine, yours in pairs)
    return {
        "questions": len(ours["scores"]), "likelihoods": len(pairs), "largest_difference": far,
        "greedy_differs": sum(mine[1] != yours[1] for mine, yours in pairs),
        "greedy": sum(mine[1] == "True" for mine, _ in pairs),
        "accuracy": {"shoal": ours["acc"], "hf": theirs["acc"]},
        "accuracy_by_length": {"shoal": ours["acc_norm"], "hf": theirs["acc_norm"]},
    }  # fmt: skip


def holds(found: dict[str, Any]) -> bool:
    """Whether one task shows what it is to show."""
    same = all(found[name]["shoal"] == found[name]["hf"] for name in ("accuracy", "accuracy_by_length"))
    return same and found["largest_difference"] < NEAR and not found["greedy_differs"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=100)
    questions = parser.parse_args().questions
    python = os.environ.get(PYTHON, "")
    if not python or not PROMPTS.is_dir():
        print(f"skipped: {PYTHON} names no python that has lm-eval" if not python else f"skipped: no {PROMPTS}")
        return 0
    result: dict[str, Any] = {"near": NEAR, "harness": version_of(python)}
    good = True
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            tasks = list(make_tasks(Path(temporary), questions, SHOTS[name]))
            theirs = evaluate(python, Path(temporary), tasks, "hf", model, CONTEXT[name])
            ours = evaluate(python, Path(temporary), tasks, "shoal", model, CONTEXT[name])
        found = {task: compare(ours[task], theirs[task]) for task in tasks}
        good &= all(map(holds, found.values()))
        result[name] = {**found, "seconds": {"shoal": ours["seconds"], "hf": theirs["seconds"]}}
        print(name, json.dumps(result[name], indent=1), flush=True)
    path = write_result("harness", {**result, "shown": good})
    print(f"{'equal' if good else 'NOT EQUAL'}: {path}")
    return 0 if good else 1


def version_of(python: str) -> str:
    """Of the harness."""
    words = "from importlib.metadata import version; print(version('lm-eval'))"
    return subprocess.run([python, "-c", words], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
