"""What the numbers of a classifier's head mean: the names of its labels, and what makes probabilities of them.

It knows config.json as transformers and sentence-transformers write it; it must not know how the numbers are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.core.errors import ModelError

CLASSIFIER = "ForSequenceClassification"  # ends the names of architectures that have such a head
Activation = Literal["none", "sigmoid", "softmax"]

_PROBLEMS: Mapping[str, Activation] = {"regression": "none", "multi_label_classification": "sigmoid"}
_PREFIX = "torch.nn.modules."  # of the names that sentence-transformers gives to activations


@dataclass(frozen=True, slots=True)
class Head:
    """The labels that a head makes a number of each, and what is done to the numbers unless a row wants them raw."""

    labels: tuple[str, ...]
    activation: Activation

    def values(self, numbers: Sequence[float], activate: bool = True) -> list[float]:
        """A text's numbers as they are shown."""
        if not activate or self.activation == "none":
            return list(numbers)
        if self.activation == "sigmoid":
            return [_sigmoid(number) for number in numbers]
        powers = [math.exp(number - max(numbers)) for number in numbers]
        return [power / math.fsum(powers) for power in powers]


def read_head(config: Mapping[str, Any]) -> Head | None:
    """What config.json says of a head; None for a model that has none."""
    names, found = config.get("architectures"), config.get("id2label")
    if not isinstance(names, list) or not any(str(name).endswith(CLASSIFIER) for name in names):
        return None
    if isinstance(found, dict) and found:
        labels = tuple(str(found.get(str(number), f"LABEL_{number}")) for number in range(len(found)))
    else:
        count = config.get("num_labels")
        labels = tuple(f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2))
    return Head(labels, _activation(config, len(labels)))


def _activation(config: Mapping[str, Any], num_labels: int) -> Activation:
    """As transformers' pipeline and vLLM have it: the problem decides; then what sentence-transformers has written
    down, the identity or not; then the number of labels."""
    usual: Activation = "sigmoid" if num_labels == 1 else "softmax"
    problem = config.get("problem_type")
    if isinstance(problem, str) and problem in _PROBLEMS:
        return _PROBLEMS[problem]
    written = config.get("sentence_transformers") or {}
    name = written.get("activation_fn") if isinstance(written, dict) else None
    name = name or config.get("sbert_ce_default_activation_function")
    if problem is not None or name is None:
        return usual
    match str(name).removeprefix(_PREFIX).rpartition(".")[2]:
        case "Identity":
            return "none"
        case "Sigmoid" | "Softmax":
            return usual
    raise ModelError(
        f"config.json: activation {name!r} of a head is not supported: known are Identity, Sigmoid, Softmax"
    )


def _sigmoid(number: float) -> float:
    power = math.exp(-abs(number))
    return 1 / (1 + power) if number >= 0 else power / (1 + power)
