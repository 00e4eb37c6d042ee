"""Large batches of model work on your own hardware. Importing this name alone loads neither torch nor a model.

It knows the public names and where they live, and must not do any work at import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shoal.core.config import EngineConfig
from shoal.core.errors import ShoalError

if TYPE_CHECKING:
    from shoal.call import run
    from shoal.jobs.stream import Counts, Result, Stream
    from shoal.llm import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams, StructuredOutputsParams
    from shoal.preview.call import Explained, explain

__version__ = "0.2.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Counts",
    "EngineConfig",
    "Explained",
    "Logprob",
    "RequestOutput",
    "Result",
    "SamplingParams",
    "ShoalError",
    "Stream",
    "StructuredOutputsParams",
    "explain",
    "run",
]

_LATE = {
    **dict.fromkeys(
        ("LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "StructuredOutputsParams"),
        "shoal.llm",
    ),
    "run": "shoal.call",
    **dict.fromkeys(("Counts", "Result", "Stream"), "shoal.jobs.stream"),
    **dict.fromkeys(("Explained", "explain"), "shoal.preview.call"),
}


def __getattr__(name: str) -> object:
    """Load what is slow to load when it is first asked for."""
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
