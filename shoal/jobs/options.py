"""What the user asked of a job, checked and with its defaults. It must not know how the job is carried out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError
from shoal.jobs.devices import first_of
from shoal.remote.server import parse_url

STDIN = Path("-")
OURS, VLLM = "shoal", "vllm"  # engines
ADVICE = {
    "adapter": "name it as the rows' model, if a server at an --endpoint has it",
    "seed": "give rows that draw a seed with --body '{\"seed\": 1}'",
    "verify": "its answers are not promised to be the same again",
}


class Order(Enum):
    """In which order rows are computed and written."""

    PLAN = "plan"  # computed in the order that shares most, written in input order
    INPUT = "input"  # computed and written in input order
    FINISH = "finish"  # computed in the order that shares most, written as they finish


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """How many failed lines end the job: a share of all lines, or a count. Neither: no limit."""

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> FailureBudget:
        """From "1%", "0.5%" or "100"; a UsageError for anything else. "0" allows none."""
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
            share = float(match[1]) / 100
            if share <= 1:
                return cls(share=share)
        elif re.fullmatch(r"\d+", text.strip()):
            return cls(count=int(text))
        raise UsageError(f"--max-failures {text!r} is neither a count nor a share: write 100 or 1%")

    def exceeded(self, failed: int, total: int) -> bool:
        """Whether `failed` of `total` lines are more than the user allows."""
        if self.count is not None:
            return failed > self.count
        return self.share is not None and failed > self.share * total


def parse_body(text: str) -> dict[str, object]:
    """Request fields for rows that do not set them, from a JSON object; a UsageError for anything else."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--body is not JSON ({error}): write for example '{{\"max_tokens\": 64}}'") from error
    if not isinstance(body, dict):
        raise UsageError("--body must be a JSON object, for example '{\"max_tokens\": 64}'")
    return body


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Folders by name, from texts NAME=FOLDER; a UsageError for anything else and for a name given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UsageError(f"--adapter {text!r} names no folder: write it as NAME=FOLDER")
        if name in found:
            raise UsageError(f"--adapter {name} is given twice: give each adapter a name of its own")
        found[name] = folder
    return found


def place_of(device: str, endpoint: str | None, engine: str = OURS) -> str:
    """Where the model runs: on a device, at these addresses, or in vLLM; a UsageError for two of them, and for what is
    none."""
    if engine not in (OURS, VLLM):
        raise UsageError(f"--engine is {engine!r}; it must be {OURS} or {VLLM}")
    if engine == VLLM:
        if endpoint is not None:
            raise UsageError("--engine vllm starts a server, and --endpoint names others: leave one of them out")
        return VLLM if device == "cpu" else f"{VLLM} {device}"
    if endpoint is None:
        return device
    if device != "cpu":
        raise UsageError(f"--device {device} is for an engine of ours, and --endpoint has none: leave one of them out")
    return ",".join(parse_url(each) for each in endpoint.split(","))


def parse_share(text: str) -> float:
    """A share of all rows from "1%" or "0.5%"; a UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None or float(match[1]) > 100:
        raise UsageError(f"--verify {text!r} is not a share: write 1% or 0.1%")
    return float(match[1]) / 100


@dataclass(frozen=True, slots=True)
class JobOptions:
    """One job, as asked for on the command line or in Python."""

    input: Path  # STDIN is standard input
    output: Path
    model: str = ""  # a folder or a hub id; "" is the embedded model
    adapter: dict[str, str] = field(default_factory=dict)  # folders of LoRA adapters by the names that rows give
    prompt: str | None = None  # template over a plain row's columns, as '{text}'
    chat: bool = False  # the prompt (or a plain row's messages) goes through the model's chat template
    body: dict[str, object] = field(default_factory=dict)  # request fields for rows that do not set them
    order: Order = Order.PLAN
    memory: int | None = None  # bytes for keys and values; None: what the machine has to spare
    step_tokens: int | None = None  # at most so many tokens in one step; None: the engine's default
    device: str = (
        "cpu"  # where the model runs: see parse_devices; addresses of servers, with commas; or vLLM and a device
    )
    weights: str = "auto"  # one of core/config's WEIGHTS; auto takes the checkpoint's
    kv: str = "auto"  # how keys and values are kept: as they come, or rounded to int8
    threads: int | None = None  # of each engine's kernels; None: OMP_NUM_THREADS or the number of cores
    seed: int = 0  # decides the seed of rows that bring none
    max_failures: FailureBudget = FailureBudget()
    strict: bool = False  # a malformed line ends the job before it starts, and rows must name its model
    restart: bool = False  # forget the state of an earlier run and begin again
    overwrite: bool = False  # an output file without a state folder may be replaced
    openai: bool = False  # plain rows come back in the OpenAI shape too
    one_file: bool = False  # failed lines go into the output file, not into one of their own
    cache: Path | None = None  # a folder of answers that other jobs may use too
    verify: float = 0.0  # share of the answered rows that are computed again and compared at the end
    quiet: bool = False  # nothing on the terminal but errors

    def __post_init__(self) -> None:
        for name, kind in (("input", Path), ("output", Path), ("order", Order), ("max_failures", FailureBudget)):
            if not isinstance(getattr(self, name), kind):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be a {kind.__module__}.{kind.__name__}")
        if not 0 <= self.verify <= 1:
            raise UsageError(f"verify is {self.verify!r}; it is a share of all rows, from 0 to 1")
        if self.servers:
            self._check_served()
        if not self.endpoints:
            self.engine()  # so that a wrong value is refused before anything is read

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The servers that answer in place of an engine of ours; none where one does."""
        return tuple(map(parse_url, self.device.split(","))) if "://" in self.device else ()

    @property
    def starts_vllm(self) -> bool:
        """Whether vLLM is started for the job, to answer in place of an engine of ours."""
        return self.device.partition(" ")[0] == VLLM

    @property
    def servers(self) -> tuple[str, ...]:
        """Who answers in place of an engine of ours, started here or not; nobody where one does."""
        return (VLLM,) if self.starts_vllm else self.endpoints

    @property
    def _beside_vllm(self) -> str:
        """The device of a vLLM that is started for the job."""
        return self.device.removeprefix(VLLM).strip() or "cpu"

    def _check_served(self) -> None:
        """Refuse what only an engine of ours can be told."""
        alone = () if self.starts_vllm else ("memory", "step_tokens", "weights", "threads")  # these vLLM knows too
        other = "--engine vllm starts another" if self.starts_vllm else "--endpoint has none"
        defaults = {each.name: each.default for each in fields(self)} | {"adapter": {}}
        for name in ("adapter", "kv", "seed", "verify", *alone):
            if getattr(self, name) != defaults[name]:
                advice = ADVICE.get(name, "leave it out")
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is for an engine of ours, and {other}: {advice}")
        if self.starts_vllm and "," in self.device:
            raise UsageError(
                f"--device {self._beside_vllm} names several, and --engine vllm starts one server on one: name one, or "
                "start a server on each and give their addresses by --endpoint"
            )
        if self.starts_vllm and self.weights not in ("auto", "bf16", "fp32"):
            raise UsageError(
                f"--weights {self.weights} is for an engine of ours, and {other}: it takes auto, bf16, fp32, and "
                "checkpoints that are quantised"
            )
        if self.endpoints and self.strict and not self.model:
            raise UsageError("--strict holds rows to one model: with --endpoint say which by --model")

    def engine(self) -> EngineConfig:
        """What the engine is told. A UsageError for values that no engine can have."""
        given = {
            "model": self.model,
            "adapters": self.adapter,
            "device": first_of(self._beside_vllm if self.starts_vllm else self.device),
            "weights": self.weights,
            "kv": self.kv,
            "threads": self.threads,
            "memory_bytes": self.memory,
            "step_tokens": self.step_tokens,
            "seed": self.seed,
        }
        return EngineConfig.from_mapping({name: value for name, value in given.items() if value is not None})
