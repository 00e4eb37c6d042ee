"""Other engines on the same token ids, each in a process of its own that sleeps while anybody else is measured.

It knows how the runners outside this package are called and what they print; it must not know our engine.
A runner loads once, runs every workload several times, and prints a line after each run: there it is stopped (SIGSTOP,
its whole process group) until its next turn, so that runs alternate and no spinning thread of a peer is in the way.
Where they are: SHOAL_PEER_RUNNERS is the folder of the runners (default: shared/bench beside the repository), and
SHOAL_PEER_VLLM, _OPENVINO and _LLAMACPP are each a peer's own python; _OPENVINO_MODEL and _LLAMACPP_MODEL are the
model in that peer's form.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shoal.bench.workloads import Workload
from shoal.core.errors import ShoalError, UsageError

PREFIX = "SHOAL_PEER_"
_RUNNERS = Path(__file__).resolve().parents[3] / "shared" / "bench"
_SPAN = re.compile(r"\s*wall ([\d.]+)s own [\d.]+ cores, others ([\d.]+) cores cpu ([\d.]+)s")
_RUN = re.compile(r"(\S+) \d+ [\d.]+ (\d+)\s*$")


class PeerFailed(ShoalError):
    """A peer ended, or answered with other lengths than it was asked for."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One run of a workload by a peer: seconds, and CPU seconds of its whole process tree."""

    wall: float
    cpu: float | None
    others: float | None  # cores that others kept busy


@dataclass(frozen=True, slots=True)
class _Command:
    """How a peer is started. `says_loaded`: it prints LOADED before its first run."""

    words: tuple[str, ...]
    environment: dict[str, str]
    says_loaded: bool


@contextmanager
def started(
    asked: Sequence[str], model: Path, workloads: Sequence[Workload], runs: int, cores: int
) -> Iterator[list[Peer]]:
    """These peers, started one after the other, each asleep once it has loaded; none outlives the block.

    A peer is asked for by its name, or as `name:words` with more words for its runner, which are its settings.
    UsageError for one that is not here.
    """
    commands = [(each, _command(each.partition(":")[0], model, cores, os.environ)) for each in asked]  # before a start
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, _leave)
        stack.callback(signal.signal, signal.SIGTERM, before)
        peers: list[Peer] = []
        for each, command in commands:
            peers.append(Peer(each, command, workloads, runs, shlex.split(each.partition(":")[2])))
            stack.callback(peers[-1].close)
            peers[-1].load()
        yield peers


def _leave(number: int, frame: object) -> None:
    """Asked to end: go through what ends the peers."""
    sys.exit(128 + number)


class Peer:
    """A runner's process. `run` wakes it for its next run; the order of runs is workload by workload."""

    def __init__(
        self, name: str, command: _Command, workloads: Sequence[Workload], runs: int, arguments: list[str]
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        files = [_write(workload, folder) for workload in workloads]
        self._asked = [workload for workload in workloads for _ in range(runs)]
        self._results: list[dict[str, Any]] = []
        self._log = folder / "log"
        # A group of its own in our session: should we be killed while it is stopped, the kernel hangs it up.
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command.words, "--w", *files, "--runs", str(runs), *arguments],
                cwd=folder, env={**os.environ, **command.environment, "RESULTS": str(folder / "results.jsonl")},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, process_group=0,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._out: IO[str] = self._process.stdout
        self._says_loaded = command.says_loaded

    def load(self) -> None:
        """Wait until it has loaded, where it says so; then it sleeps. PeerFailed when it ends instead."""
        if self._says_loaded and not any(line.startswith("LOADED") for line in self._lines()):
            raise self._failed("ended before it had loaded")
        self._sleep()

    def run(self) -> PeerRun:
        """Wake it until its next run is over. PeerFailed when it ends, or has other lengths than it was asked for."""
        workload, span = self._asked.pop(0), None
        self._signal(signal.SIGCONT)
        for line in self._lines():
            span = _SPAN.match(line) or span
            run = _RUN.match(line)
            if run and span:
                self._sleep()
                if run[1] != workload.name or int(run[2]) != workload.answer_tokens:
                    asked = f"where {workload.answer_tokens} were asked of {workload.name}"
                    raise self._failed(f"gave {run[2]} tokens for {run[1]} {asked}")
                wall, others, cpu = (float(number) for number in span.groups())
                return PeerRun(wall, cpu, others)
        raise self._failed("ended before its runs were over")

    def finish(self) -> dict[str, Any]:
        """Let it end; what it says about itself: version, settings, load_s, peak_rss_gb."""
        self._signal(signal.SIGCONT)
        for _ in self._lines():
            pass
        last = self._results[-1] if self._results else {}
        about = {name: last.get(name) for name in ("peer", "version", "settings", "load_s", "peak_rss_gb")}
        return {**about, "results": self._results}

    def close(self) -> None:
        """End the process and all it has started."""
        for number in (signal.SIGKILL, signal.SIGCONT):
            self._signal(number)
        self._process.wait()
        self._out.close()
        self._folder.cleanup()

    def _lines(self) -> Iterator[str]:
        for line in self._out:
            if line.startswith("RESULT "):
                self._results.append(json.loads(line.removeprefix("RESULT ")))
            yield line

    def _sleep(self) -> None:
        """Stop the group, and wait until its first process has stopped (or ended)."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # all of it has ended

    def _failed(self, what: str) -> PeerFailed:
        last = self._log.read_text(errors="replace").strip().splitlines()[-20:]
        return PeerFailed("\n".join([f"the peer {self.name} {what}; the last it said:", *last]))


def _write(workload: Workload, folder: Path) -> str:
    """The workload in the runners' form; the path."""
    prompts = [row.prompt.tolist() for row in workload.rows]
    data = {
        "name": workload.name, "vocab": workload.vocab_size, "order": "shuffled", "scale": workload.scale,
        "requests": [
            {"id": row.name, "prompt": prompt, "max_tokens": row.answer}
            for row, prompt in zip(workload.rows, prompts, strict=True)
        ],
        "stats": {
            "n": len(prompts), "prompt_tokens": workload.prompt_tokens, "output_tokens": workload.answer_tokens,
            "unique_prompt_tokens": _distinct(prompts), "max_prompt": max(map(len, prompts)),
        },
    }  # fmt: skip
    path = folder / f"{workload.name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def _distinct(prompts: list[list[int]]) -> int:
    """Prompt tokens that have to be computed at least once."""
    distinct, before = 0, []  # type: int, list[int]
    for prompt in sorted(prompts):
        common = 0
        while common < min(len(prompt), len(before)) and prompt[common] == before[common]:
            common += 1
        distinct, before = distinct + len(prompt) - common, prompt
    return distinct


def _command(name: str, model: Path, cores: int, environment: Mapping[str, str]) -> _Command:
    runners = Path(environment.get(f"{PREFIX}RUNNERS", str(_RUNNERS)))
    python = environment.get(f"{PREFIX}{name.upper()}", "")
    if not python or not Path(python).exists():
        raise UsageError(f"the peer {name} is not here: set {PREFIX}{name.upper()} to the python that has it")
    script = runners / {"vllm": "run_vllm.py", "openvino": "run_ov.py", "llamacpp": "run_lcpp.py"}[name]
    if not script.exists():
        raise UsageError(f"there is no runner {script}: set {PREFIX}RUNNERS to the folder of the peers' runners")
    if name == "vllm":
        return _vllm(python, script, model.resolve(), cores, environment)
    theirs = environment.get(f"{PREFIX}{name.upper()}_MODEL", "")
    if not theirs or not Path(theirs).exists():
        raise UsageError(f"the peer {name} needs the model in its own form: set {PREFIX}{name.upper()}_MODEL")
    if name == "openvino":
        return _Command((python, str(script), "--model", theirs, "--threads", str(cores)), {}, True)
    library = next(iter(_site(python).glob("llama_cpp/lib")), None)
    more = {} if library is None or "LLAMA_CPP_LIB_PATH" in environment else {"LLAMA_CPP_LIB_PATH": str(library)}
    return _Command((python, str(script), "--gguf", theirs, "--threads", str(cores)), more, False)


def _vllm(python: str, script: Path, model: Path, cores: int, environment: Mapping[str, str]) -> _Command:
    """vLLM's defaults, with its known traps avoided: all cores bound to it, and the two libraries it wants first."""
    folders = [_site(python).parents[1], Path("/usr/lib")]
    preload = [environment.get("LD_PRELOAD", "")]
    for name in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        found = (path for folder in folders for path in sorted(folder.rglob(name)))
        preload += [str(path) for path in found][:1]
    words = (python, str(script), "--model", str(model), "--bind", f"0-{cores - 1}", "--kv", "5")
    return _Command(words, {"LD_PRELOAD": ":".join(filter(None, preload)), "OMP_NUM_THREADS": str(cores)}, True)


def _site(python: str) -> Path:
    """The packages of a virtual environment."""
    found = sorted(Path(python).absolute().parent.parent.glob("lib/python*/site-packages"))
    return found[0] if found else Path(python).absolute().parent
