"""A server of the OpenAI API that misbehaves as it is told, and knows the answer to every prompt.

It must not know who asks. Every prompt has a script of faults, one for each time that it is asked; after them it is
answered. What was asked, in which order, and how many were under way at once, is noted.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "503 later", "500", "drop", "half", "cut json", "no json", "unended", "error in 200", "few", "stall")
STALL = 10.0  # seconds; of "stall" nobody waits for them to pass, while "late" answers after them


def answer_to(prompt: str, index: int = 0) -> str:
    """What the server says to a prompt."""
    return f"<{index}: {prompt[-40:]} é>"


def script_of_all(prompt: str) -> Sequence[str]:
    """Another fault or two for every prompt, all of them among a few."""
    seed = sum(prompt.encode())
    return [FAULTS[(seed + step) % len(FAULTS)] for step in range(seed % 3)]


class BadServer(ThreadingHTTPServer):
    """Listens at `url` until it is closed."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, script: Callable[[str], Sequence[str]] = lambda prompt: (), room: int = 10_000, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.room = script, room
        self.seconds = 0.0  # that an answer takes
        self.key = ""  # that callers must have
        self.models: list[str] = []
        self.plain = False  # its complaints have no code
        self.lock = threading.Lock()
        self.asked: list[str] = []  # prompts, as they came, in vain or not
        self.answered = Counter[str]()  # whole answers by prompt
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.refused = 0  # for want of room
        self.running = self.most = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(*args: Any, **more: Any) -> Iterator[BadServer]:
    """A server while the context lasts."""
    server = BadServer(*args, **more)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def prompt_of(body: dict[str, Any]) -> str:
    """The text that a body asks about."""
    if "messages" in body:
        return "".join(str(turn["content"]) for turn in body["messages"])
    return str(body.get("prompt", body.get("input")))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the acknowledgement of its headers
    server: BadServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def stranger(self) -> bool:
        """Whether the caller has not the key, and was told."""
        known = not self.server.key or self.headers["authorization"] == f"Bearer {self.server.key}"
        if not known:
            self.say(401, {"error": "Unauthorized"})
        return not known

    def do_GET(self) -> None:
        if not self.stranger():
            self.say(200, {"data": [{"id": model} for model in self.server.models]})

    def do_POST(self) -> None:
        if self.stranger():
            return
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, server = prompt_of(body), self.server
        with server.lock:
            before = server.asked.count(prompt) if server.script(prompt) else 0
            server.asked.append(prompt)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            full = server.running >= server.room
            server.refused += full
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            if full:
                return self.say(429, {"error": {"message": "no room", "code": "rate_limit_exceeded"}})
            if server.seconds:
                server.closing.wait(server.seconds)
            script = server.script(prompt)
            if before < len(script):
                return self.fail(script[before], body)
            with server.lock:
                server.answered[prompt] += 1
            self.say(200, self.answer(body, prompt))
        finally:
            with server.lock:
                server.running -= 1

    def fail(self, fault: str, body: dict[str, Any]) -> None:
        """Do what is wrong."""
        whole = self.answer(body, prompt_of(body))
        match fault:
            case "429":
                self.say(429, {"error": "slow down"}, {"retry-after": "0.05"})
            case "503 later":
                at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - 1))
                self.say(503, {}, {"Retry-After": at})
            case "500":
                self.say(500, {"error": {"message": "oh", "type": "server_error"}})
            case "drop":
                self.close_connection = True
            case "half":
                text = json.dumps(whole).encode()
                self.begin(200, {"content-length": str(len(text))})
                self.wfile.write(text[: len(text) // 2])
                self.close_connection = True
            case "cut json":
                text = json.dumps(whole).encode()
                self.begin(200, {"content-length": str(len(text) // 2)})
                self.wfile.write(text[: len(text) // 2])
            case "no json":
                self.say(200, "<html>all is well</html>")
            case "unended":
                for part in whole.get("choices", whole.get("data")):
                    part |= {"finish_reason": None, "embedding": []}
                self.say(200, whole)
            case "error in 200":
                self.say(200, {"error": {"message": "worker died", "code": 500}})
            case "few":
                for name in ("choices", "data"):
                    if name in whole:
                        whole[name] = whole[name][1:]
                self.say(200, whole)
            case "stall":
                self.server.closing.wait(STALL)
                self.close_connection = True
            case "late":
                self.server.closing.wait(STALL)
                with self.server.lock:
                    self.server.answered[prompt_of(body)] += 1
                self.say(200, whole)  # whether anybody still listens or not
            case "later" | "500 later":
                self.say(429 if fault == "later" else 500, {"error": "come back"}, {"retry-after": "3600"})
            case _:
                code = {} if self.server.plain else {"code": "context_length_exceeded"}
                self.say(int(fault), {"error": {"message": f"as told: {fault}", **code}})

    def answer(self, body: dict[str, Any], prompt: str) -> dict[str, Any]:
        """The whole answer; of several choices the last comes first."""
        if "input" in body:
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"index": i, "embedding": [float(len(text)), 0.5]} for i, text in enumerate(texts)]
            return {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": len(prompt)}}
        choices = []
        for index in range(body.get("n", 1)):
            text = answer_to(prompt, index)
            said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
            choices.append({"index": index, **said, "finish_reason": "stop"})
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": 3 * len(choices),
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        return {"id": "x", "model": body.get("model", "default"), "choices": choices[::-1], "usage": usage}

    def say(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        text = body.encode() if isinstance(body, str) else json.dumps(body, indent=1).encode()
        self.begin(status, {"content-length": str(len(text)), **(headers or {})})
        self.wfile.write(text)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
