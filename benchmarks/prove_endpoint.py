"""Proof: over a real server a file goes faster in Shoal's order than in its own, and every row is answered once.

The server is llama.cpp's, in an environment of its own with its `server` extra, named as for `shoal bench --peer`: it
keeps the last prompt's keys and values, so it shares what two prompts after one another begin with. Both orders run by
turns against one server that stays up. It must not know how rows are sent.

    SHOAL_PEER_LLAMACPP=/path/python SHOAL_PEER_LLAMACPP_MODEL=/path/model.gguf python -m benchmarks.prove_endpoint
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import shoal
from benchmarks.common import write_result
from shoal.jobs.options import Order

PROVES = ("shoal/remote", "shoal/jobs/passing_encode.py", "shoal/jobs/plan_order.py")
PEER, MODEL = "SHOAL_PEER_LLAMACPP", "SHOAL_PEER_LLAMACPP_MODEL"

SEED = 5
LEAST = 1.3  # times the throughput in file order
CONTEXT = 2048
READY = 60.0  # seconds for a server to load
WORDS = "river stone lamp window garden paper summer bridge copper silence basket morning".split()


def missing() -> str:
    """Why there is no server to ask; '' when there is one."""
    for name in (PEER, MODEL):
        if not Path(os.environ.get(name, "")).is_file():
            return f"{name} names no file: no llama.cpp server to ask"
    found = subprocess.run([os.environ[PEER], "-c", "import llama_cpp.server.app, uvicorn"], capture_output=True)
    return "" if found.returncode == 0 else f"the environment of {PEER} has no llama-cpp-python[server]"


@contextmanager
def serving(log: Path) -> Iterator[str]:
    """llama.cpp's server, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ[PEER], "-m", "llama_cpp.server", "--model", os.environ[MODEL], "--port", str(port)]
    command += ["--n_ctx", str(CONTEXT), "--n_threads", str(len(os.sched_getaffinity(0)))]
    environment = {**os.environ, "GOMP_SPINCOUNT": "5000"}
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server has loaded its model."""
    end = time.monotonic() + READY
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server does not come up: {log.read_text(errors='replace')[-2000:]}")


def rows(families: int, members: int, words: int) -> list[str]:
    """Questions about texts of so many words, each text's questions far apart in the file."""
    luck, found = Random(SEED), []
    texts = [" ".join(luck.choices(WORDS, k=words)) for _ in range(families)]
    for member in range(members):
        for family, text in enumerate(texts):
            messages = [
                {"role": "system", "content": f"List {family}: {text}."},
                {"role": "user", "content": f"Is the word {luck.choice(WORDS)} in it? Question {member}."},
            ]
            body = {"model": "any", "messages": messages, "max_tokens": 4, "temperature": 0}
            found.append({"custom_id": f"r{len(found)}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return [json.dumps(row) for row in found]


def answer(source: Path, out: Path, order: Order, url: str) -> dict[str, Any]:
    """One job, and its pace."""
    began = time.monotonic()
    report = shoal.run(source, out, endpoint=url, order=order)
    seconds = time.monotonic() - began
    asked = [json.loads(line)["custom_id"] for line in source.read_text().splitlines()]
    once = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()] == asked
    tokens = report.tokens.prompt + report.tokens.output
    print(f"{order.value:6} {seconds:6.2f} s  {tokens / seconds:7.1f} tokens/s  {report.sent}", flush=True)
    return {
        "order": order.value, "seconds": round(seconds, 3), "rows": report.rows.ok,
        "prompt_tokens": report.tokens.prompt, "output_tokens": report.tokens.output,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests": report.sent.requests, "all_rows_once_in_order": once and not report.problems(),
    }  # fmt: skip


def main() -> int:
    """Print what holds; 1 when something does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", type=int, default=4)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    if why := missing():
        print(why)
        return 0
    with tempfile.TemporaryDirectory() as place, serving(Path(place) / "server.log") as url:
        folder = Path(place)
        source = folder / "in.jsonl"
        source.write_text("\n".join(rows(asked.families, asked.members, asked.words)) + "\n")
        turns = [
            answer(source, folder / f"{turn}.{order.value}.jsonl", order, url)
            for turn in range(asked.turns)
            for order in (Order.INPUT, Order.PLAN)
        ]
    pace = {name: [one["tokens_per_second"] for one in turns if one["order"] == name] for name in ("input", "plan")}
    times = median(pace["plan"]) / median(pace["input"])
    claims = {
        "every_row_once_in_order": all(one["all_rows_once_in_order"] for one in turns),
        f"throughput_at_least_{LEAST}_times_that_of_file_order": times >= LEAST,
        "faster_in_every_turn": min(pace["plan"]) > max(pace["input"]),
    }
    for claim, holds in claims.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}")
    model = Path(os.environ[MODEL]).name
    result = {"peer": "llama.cpp's server", "model": model, "times_the_throughput": round(times, 3), "turns": turns}
    write_result("endpoint", {**result, "claims": claims}, SEED)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
