"""What an engine can be told, in one frozen object that is resolved once and never rewrites itself.

It must not load, look for or measure anything: a value that stands for "find out" is None, and build finds out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from shoal.core.errors import UsageError

BLOCK_SIZE = 32  # tokens in a KV block: small enough to share, large enough to read in a row
WEIGHTS = ("auto", "fp32", "bf16", "int8", "int8+head", "int4", "int4+head", "int4-a16")
KV = ("auto", "int8")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "int | None": (int, type(None)), "dict[str, str]": (dict,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that decides how an engine is built. A field's comment gives its unit and the default's reason."""

    model: str = ""  # folder or hub id; empty is the embedded model, so that the first command works
    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"; cpu because every machine has one
    weights: str = (
        "auto"  # one of WEIGHTS; auto takes a 16-bit checkpoint as bf16, others as fp32: never quantised unasked
    )
    kv: str = "auto"  # one of KV, how keys and values are kept; auto as they come: never rounded unasked
    kernels: str = "auto"  # backend of tensor functions; auto takes the fastest that the device has
    threads: int | None = None  # of the kernels; None takes OMP_NUM_THREADS or the number of cores
    block_size: int = BLOCK_SIZE  # divides 256
    memory_bytes: int | None = None  # of keys and values; None takes what is free beside the weights, less 1 GB
    context: int | None = None  # tokens of a prompt with its answer; None takes the model's own limit
    step_tokens: int = 2048  # computed in one step: past this a CPU step gains nothing, and decodes would wait longer
    max_sequences: int = 256  # in one step: decodes read the weights once for all of them
    overlap: bool = True  # plan a step while the one before runs
    reuse: bool = True  # compute a shared prefix once; False is the control
    policy: str = "auto"  # a short name, or an import path module:Class; auto is the batch policy
    seed: int = 0  # from which a row without a seed of its own gets one
    adapters: dict[str, str] = field(default_factory=dict)  # LoRA adapters' folders by the names that requests give

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming the field."""
        least = {"block_size": 1, "step_tokens": 1, "max_sequences": 1, "context": 1, "threads": 1, "memory_bytes": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}")
        if 256 % self.block_size:
            raise UsageError(f"block_size is {self.block_size}; it must divide 256: 16, 32 and 64 are sensible")
        if self.weights not in WEIGHTS:
            raise UsageError(f"weights is {self.weights!r}; it must be one of {', '.join(WEIGHTS)}")
        if self.kv not in KV:
            raise UsageError(f"kv is {self.kv!r}; it must be one of {', '.join(KV)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device!r}; it must be cpu, cuda or cuda:N")
        for name, folder in self.adapters.items():
            if not (isinstance(name, str) and isinstance(folder, str) and name and "\0" not in name):
                raise UsageError(f"adapters has {name!r}: {folder!r}; it must hold folders by name")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> EngineConfig:
        """Build from names and values. UsageError for an unknown name (with the nearest known) or a wrong type."""
        known = {each.name: str(each.type) for each in fields(cls)}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise UsageError(f"unknown engine setting {name!r}: {hint}")
            allowed = _TYPES[known[name]]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise UsageError(f"engine setting {name!r} is {value!r}; it must be {known[name]}")
        return cls(**values)  # type: ignore[arg-type]  # types were compared just now

    def to_mapping(self) -> dict[str, object]:
        """Names and values, so that `from_mapping` of it is this config."""
        return asdict(self)


def parse_bytes(text: str) -> int:
    """Bytes in a size such as 800MB, 1.5GiB or 4096. UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size: write it as 800MB, 6GB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])
