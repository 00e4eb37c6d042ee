"""Proof: over a real server a file goes faster in Shoal's order than in its own, and every row is answered once.

The servers are llama.cpp's, which keeps the last prompt's keys and values, and vLLM's, whose memory is short of the
prefixes (`vllm`) or has room for all of them (`vllm_ample`: there either order may do, and nothing is claimed). Each is
in an environment of its own, named as for `shoal bench --peer`. Both orders run by turns against one server that stays
up. What is not asked for, or not here, keeps its earlier result. It must not know how rows are sent.

    SHOAL_PEER_LLAMACPP=/path/python SHOAL_PEER_LLAMACPP_MODEL=/path/model.gguf SHOAL_PEER_VLLM=/path/python \
    python -m benchmarks.prove_endpoint [llamacpp] [vllm] [vllm_ample]
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import shoal
from benchmarks.common import RESULTS, ROOT, SHARED, commit, write_result
from benchmarks.prove_planning import model
from shoal.core.errors import UsageError
from shoal.jobs.options import Order
from shoal.remote.own import Command, OwnServer
from shoal.remote.vllm import Wishes, command, find

PROVES = ("shoal/remote", "shoal/jobs/passing_encode.py", "shoal/jobs/plan_order.py")
PEER, MODEL = "SHOAL_PEER_LLAMACPP", "SHOAL_PEER_LLAMACPP_MODEL"
VLLM = "SHOAL_PEER_VLLM"

SEED = 5
LEAST = 1.3  # times the throughput in file order
CONTEXT = 2048
READY = 60.0  # seconds for a server to load
COMPILED = 200.0  # and for vLLM, which compiles at every start
SHORT, AMPLE = 32 << 20, 1 << 30  # bytes for keys and values
WORDS = "river stone lamp window garden paper summer bridge copper silence basket morning".split()

Serving = Callable[[Path], AbstractContextManager[str]]


@dataclass(frozen=True)
class Part:
    """A server, the rows that it is asked, and whether the order is to matter."""

    serving: Serving
    missing: Callable[[], str]
    families: int
    members: int
    words: int
    url: str
    claims: bool


def missing() -> str:
    """Why there is no llama.cpp server to ask; '' when there is one."""
    for name in (PEER, MODEL):
        if not Path(os.environ.get(name, "")).is_file():
            return f"{name} names no file: no llama.cpp server to ask"
    found = subprocess.run([os.environ[PEER], "-c", "import llama_cpp.server.app, uvicorn"], capture_output=True)
    return "" if found.returncode == 0 else f"the environment of {PEER} has no llama-cpp-python[server]"


def no_vllm() -> str:
    """Why there is no vLLM to start, or no model for it."""
    if not os.environ.get(VLLM):
        return f"{VLLM} names no python: no vLLM to start"
    if not (ROOT / "build" / "bench-models").is_dir() and not SHARED.is_dir():
        return f"{SHARED} is missing, which makes the model"
    try:
        find(os.environ)
    except UsageError as error:
        return str(error)
    return ""


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


def serving_vllm(memory: int, context: int = 1024) -> Serving:
    """vLLM's server with so much memory for keys and values, started as `--engine vllm` does."""

    @contextmanager
    def serve(log: Path) -> Iterator[str]:
        found, wishes = find(os.environ), Wishes(model().absolute(), "qwen05b", memory=memory)

        def make(port: int, key: str) -> Command:
            made = command(found, wishes, port, key, os.environ)
            return Command((*made.words, "--max-model-len", str(context)), made.environment)

        server, before = OwnServer(found.name, make, log), os.environ.get("OPENAI_API_KEY")
        try:
            if not server.ready(COMPILED):
                raise SystemExit(f"vLLM does not come up: {log.read_text(errors='replace')[-2000:]}")
            print(f"{found.name} was ready after {server.seconds:.0f} s", flush=True)
            os.environ["OPENAI_API_KEY"] = server.key
            yield server.url
        finally:
            server.close()
            os.environ.pop("OPENAI_API_KEY", None)
            os.environ.update({} if before is None else {"OPENAI_API_KEY": before})

    return serve


PARTS = {
    "llamacpp": Part(serving, missing, 4, 6, 150, "/v1/chat/completions", True),
    "vllm": Part(serving_vllm(SHORT), no_vllm, 8, 4, 230, "/v1/completions", True),
    "vllm_ample": Part(serving_vllm(AMPLE), no_vllm, 8, 4, 230, "/v1/completions", False),
}


def rows(families: int, members: int, words: int, url: str = "/v1/chat/completions") -> list[str]:
    """Questions about texts of so many words, each text's questions far apart in the file."""
    luck, found = Random(SEED), []
    texts = [" ".join(luck.choices(WORDS, k=words)) for _ in range(families)]
    for member in range(members):
        for family, text in enumerate(texts):
            asked = f"Is the word {luck.choice(WORDS)} in it? Question {member}."
            messages = [{"role": "system", "content": f"List {family}: {text}."}, {"role": "user", "content": asked}]
            what = {"messages": messages} if "chat" in url else {"prompt": f"List {family}: {text}. {asked}"}
            body = {"model": "qwen05b", **what, "max_tokens": 4, "temperature": 0}
            found.append({"custom_id": f"r{len(found)}", "method": "POST", "url": url, "body": body})
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
        "prompt_cached": report.sent.prompt_cached, "tokens_per_second": round(tokens / seconds, 2),
        "requests": report.sent.requests, "all_rows_once_in_order": once and not report.problems(),
    }  # fmt: skip


def prove(part: Part, turns: int, folder: Path) -> dict[str, Any]:
    """Both orders by turns over one server, and what holds."""
    source = folder / "in.jsonl"
    source.write_text("\n".join(rows(part.families, part.members, part.words, part.url)) + "\n")
    with part.serving(folder / "server.log") as url:
        found = [
            answer(source, folder / f"{turn}.{order.value}.jsonl", order, url)
            for turn in range(turns)
            for order in (Order.INPUT, Order.PLAN)
        ]
    pace = {name: [one["tokens_per_second"] for one in found if one["order"] == name] for name in ("input", "plan")}
    times = median(pace["plan"]) / median(pace["input"])
    claims = {"every_row_once_in_order": all(one["all_rows_once_in_order"] for one in found)}
    if not part.claims:  # only the first turn finds an empty cache: the turns say nothing about each other
        return {"turns": found, "claims": claims}
    claims[f"throughput_at_least_{LEAST}_times_that_of_file_order"] = times >= LEAST
    claims["faster_in_every_turn"] = min(pace["plan"]) > max(pace["input"])
    return {"times_the_throughput": round(times, 3), "turns": found, "claims": claims}


def main() -> int:
    """Print what holds; 1 when something does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=["llamacpp", "vllm"])
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    kept = RESULTS / "endpoint.json"
    peers: dict[str, Any] = json.loads(kept.read_text()).get("peers", {}) if kept.exists() else {}
    holds = True
    for name in asked.parts:
        if why := PARTS[name].missing():
            print(f"{name}: {why}")
            continue
        with tempfile.TemporaryDirectory() as place:
            found = prove(PARTS[name], asked.turns, Path(place))
        version = Path(os.environ[MODEL]).name if name == "llamacpp" else find(os.environ).name
        peers[name] = {"of": version, "commit": commit(), **found}
        for claim, held in found["claims"].items():
            print(f"{name}: {claim}: {'holds' if held else 'DOES NOT HOLD'}")
        holds &= all(found["claims"].values())
        write_result("endpoint", {"peers": peers}, SEED)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
