"""A modelled machine with a model on it, and clusters of such: what a step takes and how many blocks there are.

It knows hardware, shapes and how engines are put together; it must not know workloads or what is measured.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.core.clock import SimClock
from shoal.core.errors import UsageError
from shoal.core.types import Promise, Step
from shoal.sched.cost import Cost
from shoal.sched.place import PLACEMENTS
from shoal.sched.policies import find_policy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.sim.cluster import Cluster
from shoal.sim.executor import SimExecutor
from shoal.sim.hardware import HARDWARE
from shoal.sim.instance import Instance
from shoal.sim.oracle import Oracle
from shoal.sim.roofline import Roofline
from shoal.sim.shapes import SHAPES, Shape, shape_of
from shoal.sim.stages import PerStage, Staged, StagedExecutor

BLOCK = 32  # tokens, as the product's

Number = int | float
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
MakePolicy = Callable[[Mapping[str, int]], Policy]  # true lengths of what has come, which only an oracle looks at

ORACLE = "oracle"  # of true lengths, for upper bounds: "oracle" is Past-Future with one, "oracle@NAME" any policy


class Repeating:
    """A roofline that also prices many decode steps alike at once, each to the last bit as it would alone.

    In them nothing differs but what attention reads, and the time in which the host is the slower one.
    """

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline

    def seconds(self, step: Step) -> float:
        """As the roofline has it."""
        return self.roofline.seconds(step)

    def repeated(self, step: Step, count: int) -> list[float]:
        """Durations of the decode-only step and of those after it, each with every sequence a token further on."""
        roofline, shape, machine = self.roofline, self.roofline.shape, self.roofline.hardware
        load, kept = roofline.load(step), machine.efficiency
        parts = roofline.parts(load)
        seen = load.decodes + self._growth(step, count)
        operations = 4 * shape.heads * shape.head_dim / roofline.tensor
        position = shape.kv_numbers(roofline.tensor) * roofline.kv_bytes
        peak, bandwidth = machine.peak[roofline.arithmetic] * kept.attention, machine.bandwidth * kept.reading
        attention = shape.layers * (np.maximum(seen * operations / peak, seen * position / bandwidth) + kept.kernel)
        device = shape.layers * kept.layer - parts.products - parts.light
        fixed = np.maximum(device - attention - parts.wires, 0.0) + kept.step + kept.row * load.rows
        return [
            sum((parts.products, parts.light, reading, parts.wires, parts.head, late))
            for reading, late in zip(attention.tolist(), fixed.tolist(), strict=True)
        ]

    def _growth(self, step: Step, count: int) -> Floats:
        """Positions that all sequences together see more than in the first step; none more than its window."""
        later: Floats = np.arange(count, dtype=np.float64)
        window = self.roofline.shape.window
        if not window:
            return later * len(step.slices)
        left = np.sort([window - part.start - 1 for part in step.slices])  # tokens until a sequence sees no more
        growing = len(left) - np.searchsorted(left, later, side="right")
        grown: Floats = np.zeros(count)
        grown[1:] = np.cumsum(growing[:-1])
        return grown


@dataclass(frozen=True, slots=True)
class Machine:
    """What one instance runs on."""

    cost: Cost
    blocks: int
    block_size: int = BLOCK
    stages: int = 1
    per_stage: PerStage | None = None  # with more than one stage
    ahead: int = 0  # steps planned while another runs, where there is one stage

    @property
    def positions(self) -> int:
        """Tokens that its blocks hold."""
        return self.blocks * self.block_size


def find_shape(model: str) -> Shape:
    """The dimensions of a known model, or of the folder of one."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model) / "config.json"
    try:
        return shape_of(Path(model).name, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"the model {model!r} is none of {', '.join(SHAPES)}, and {path} is not there") from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path} does not describe a decoder: {error}") from error


def machine_of(
    hardware: str, model: str, tensor: int = 1, pipeline: int = 1, positions: int | None = None, block: int = BLOCK
) -> Machine:
    """A model on so many devices. `positions` replaces the tokens that the memory has room for."""
    if hardware not in HARDWARE:
        raise UsageError(f"hardware {hardware!r} is not known: there are {', '.join(HARDWARE)}")
    roofline = Roofline(HARDWARE[hardware], find_shape(model), tensor, pipeline)
    room = roofline.positions if positions is None else positions
    if room < block:
        need = roofline.weights / 1e9
        raise UsageError(
            f"the weights of {model} take {need:.1f} GB of each device and leave no room for keys and values on "
            f"{hardware} ({HARDWARE[hardware].memory / 1e9:.0f} GB): give more --tensor or --pipeline"
        )
    cost: Cost = roofline if pipeline > 1 else Repeating(roofline)
    return Machine(cost, room // block, block, pipeline, roofline.stages if pipeline > 1 else None)


def policy_maker(
    text: str, cost: Cost, limit: Budget | None, promise: Promise | None, step_tokens: int | None = None
) -> MakePolicy:
    """How to make a policy from "name" or "name:setting=number:…", with what else its constructor asks for: a limit of
    steps, what steps cost, and what was promised. Without a limit it has its own, of which `step_tokens` replaces the
    tokens and nothing else."""
    knows, _, inner = text.partition("@")
    if knows == ORACLE:
        text = inner or "past-future:reserve=0"
    name, settings = _settings(text)
    try:
        kind = find_policy(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    asks = inspect.signature(kind).parameters
    if unknown := set(settings) - set(asks):
        raise UsageError(f"policy {name!r} has no setting {', '.join(sorted(unknown))}: it has {', '.join(asks)}")
    given: dict[str, object] = {"limit": limit, "cost": cost, "promise": promise}
    more = {key: value for key, value in given.items() if key in asks and value is not None}
    if step_tokens is not None and "limit" not in asks:
        raise UsageError(f"policy {name!r} takes no limit of steps: leave --step-tokens out")
    if knows == ORACLE and "lengths" not in asks:
        raise UsageError(f"policy {name!r} expects no lengths, so an oracle tells it nothing")

    def make(lengths: Mapping[str, int]) -> Policy:
        told: dict[str, Any] = {**more, **settings}
        if knows == ORACLE:
            told["lengths"] = Oracle(lengths)
        try:
            made = kind(**told)
            if step_tokens is None:
                return made
            return kind(**{**told, "limit": replace(made.limit, tokens=step_tokens)})
        except TypeError as error:
            raise UsageError(f"policy {text!r} cannot be made: {error}") from error

    return make


def _settings(text: str) -> tuple[str, Mapping[str, Number]]:
    parts = text.split(":")
    names = [part for part in parts if "=" not in part]
    settings: dict[str, Number] = {}
    for part in parts:
        if "=" in part:
            key, _, value = part.partition("=")
            try:
                settings[key] = int(value) if value.lstrip("-").isdigit() else float(value)
            except ValueError as error:
                raise UsageError(f"policy {text!r}: {part!r} is no setting; write name=number") from error
    return ":".join(names), settings


def cluster_of(
    machine: Machine, make: MakePolicy, instances: int = 1, place: str = "least-work", leaps: bool = True
) -> Cluster:
    """So many instances of the machine, each with a policy of its own."""
    if place not in PLACEMENTS:
        raise UsageError(f"place {place!r} is not known: there are {', '.join(PLACEMENTS)}")
    clock = SimClock()
    made = []
    for _ in range(instances):
        lengths: dict[str, int] = {}
        policy = make(lengths)
        if machine.per_stage is not None:
            scheduler = Scheduler(Staged(policy, machine.stages), machine.blocks, machine.block_size)
            executor: SimExecutor = StagedExecutor(clock, machine.cost, machine.per_stage, machine.stages, lengths)
            made.append(Instance(clock, scheduler, executor, machine.stages - 1, leaps))
        else:
            scheduler = Scheduler(policy, machine.blocks, machine.block_size)
            made.append(Instance(clock, scheduler, SimExecutor(clock, machine.cost, lengths), machine.ahead, leaps))
    return Cluster(clock, made, PLACEMENTS[place]())
