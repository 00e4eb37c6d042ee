"""What `shoal bench` is asked for. It must not load or measure anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import UsageError

WORKLOADS = ("W1", "W2", "W3", "W4")
KERNELS = "kernels"
PEERS = ("vllm", "openvino", "llamacpp")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One command line, checked."""

    what: tuple[str, ...] = ()  # workloads; or "kernels" alone; () is all workloads
    model: str = ""  # as in EngineConfig
    weights: tuple[str, ...] = ("auto",)  # the first is the one that everything else is compared with
    scale: float = 1.0
    threads: int | None = None  # None: one for each core
    runs: int = 5
    json: Path | None = None
    peers: tuple[str, ...] = ()  # each a name, or name:words with more words for its runner
    memory: int | None = None
    step_tokens: int | None = None

    def __post_init__(self) -> None:
        """UsageError for what cannot be."""
        if self.runs < 1 or self.scale <= 0:
            raise UsageError("bench needs at least one run, and a scale above 0")
        unknown = sorted({each.partition(":")[0] for each in self.peers} - set(PEERS))
        if unknown:
            raise UsageError(f"unknown peer {unknown[0]!r}; known are {', '.join(PEERS)}")
        strange = sorted(set(self.what) - {*WORKLOADS, KERNELS})
        if strange:
            raise UsageError(f"cannot measure {strange[0]!r}; known are {', '.join((*WORKLOADS, KERNELS))}")
        if KERNELS in self.what and len(self.what) > 1:
            raise UsageError("bench kernels stands alone: name workloads in a run of their own")
        if len(set(self.peers)) < len(self.peers):
            raise UsageError("a peer is named twice with the same words: each needs settings of its own")
        if not self.weights or (KERNELS in self.what and len(self.weights) > 1):
            raise UsageError("bench needs one mode of weights; only workloads take several, as bf16,int8")

    @property
    def cores(self) -> int:
        """Threads to use."""
        if self.threads is not None:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def settle_environment(self) -> None:
        """What OpenMP reads when it is loaded, so before torch is: as many threads, and little spinning. A spinning
        thread that shares its core with anybody costs seconds."""
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        os.environ["OMP_NUM_THREADS"] = str(self.cores)
