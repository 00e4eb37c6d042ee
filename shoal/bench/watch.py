"""Where the time of steps goes: a clock around every function of the kernels, for runs of their own.

It knows names of functions, and must not know what they compute. Timed runs are not watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from shoal.kernels.api import Kernels

PARTS = ("linear", "head", "attention", "rest", "python")
_PART_OF = {  # the others: rest
    "linear": "linear", "gated": "linear", "gated_with": "linear", "add_deltas": "linear", "logits": "head",
    "attention": "attention",
}  # fmt: skip
_NOT_OF_A_STEP = ("new_kv", "kv_bytes", "pack", "pack_gated", "pack_deltas", "prepare_heads", "prepare_layer")
_WHOLE = "layers"  # many parts in one call


@dataclass(slots=True)
class Watch:
    """Seconds inside each function of the kernels, and how often each was called."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inside: bool = False  # a function that uses another counts for both

    def parts(self, wall: float) -> dict[str, float]:
        """Seconds of each of PARTS in a run of `wall` seconds: Python is what no kernel accounts for."""
        parts = dict.fromkeys(PARTS, 0.0)
        for name, seconds in self.seconds.items():
            parts[_PART_OF.get(name, "rest")] += seconds
        parts["python"] = wall - sum(parts.values())
        return parts


@contextmanager
def watched(kernels: Kernels, parts: bool = True) -> Iterator[Watch]:
    """Time the functions of these kernels while inside, for whoever calls them through the object.

    With `parts` those of a layer are called one by one, to be told apart: that takes more of Python than a run does.
    """
    watch = Watch()
    names = [
        name
        for name in dir(type(kernels))
        if not name.startswith("_") and name not in _NOT_OF_A_STEP and callable(getattr(kernels, name))
    ]
    for name in names:
        setattr(kernels, name, _not_now if name == _WHOLE and parts else _timed(watch, name, getattr(kernels, name)))
    try:
        yield watch
    finally:
        for name in names:
            delattr(kernels, name)


def _not_now(*_: object) -> None:
    """No layer as a whole."""


def _timed(watch: Watch, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        if watch.inside:
            return function(*arguments, **named)
        watch.inside = True
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            watch.seconds[name] = watch.seconds.get(name, 0.0) + time.perf_counter() - began
            watch.calls[name] = watch.calls.get(name, 0) + 1
            watch.inside = False

    return timed
