"""A modelled machine with a model on it, and clusters of such: what a step takes and how many blocks there are.

It knows hardware, shapes and how engines are put together; it must not know workloads or what is measured.
"""

from __future__ import annotations

import inspect
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
from shoal.sim.roofline import Roofline
from shoal.sim.shapes import SHAPES, Shape, shape_of
from shoal.sim.stages import PerStage, Staged, StagedExecutor

BLOCK = 32  # tokens, as the product's

Number = int | float
MakePolicy = Callable[[], Policy]


class Repeating:
    """A roofline that also prices many decode steps alike at once, each as it would alone."""

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline

    def seconds(self, step: Step) -> float:
        """As the roofline has it."""
        return self.roofline.seconds(step)

    def repeated(self, step: Step, count: int) -> list[float]:
        """Durations of the decode-only step and of those after it, each with every sequence a token further on."""
        roofline, window = self.roofline, self.roofline.shape.window
        load = roofline.load(step)
        left = sorted(window - part.start - 1 for part in step.slices) if window else []  # until no more are seen
        found, seen = [], load.decodes
        for later in range(count):
            found.append(sum(roofline.stage_seconds(load._replace(decodes=seen))))
            seen += len(left) - bisect_right(left, later) if window else len(step.slices)
        return found


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


def policy_maker(text: str, cost: Cost, limit: Budget | None, promise: Promise | None) -> MakePolicy:
    """How to make a policy from "name" or "name:setting=number:…", with what else its constructor asks for: a limit of
    steps, what steps cost, and what was promised."""
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

    def make() -> Policy:
        try:
            return kind(**more, **settings)
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
        policy = make()
        if machine.per_stage is not None:
            scheduler = Scheduler(Staged(policy, machine.stages), machine.blocks, machine.block_size)
            executor: SimExecutor = StagedExecutor(clock, machine.cost, machine.per_stage, machine.stages)
            made.append(Instance(clock, scheduler, executor, machine.stages - 1, leaps))
        else:
            scheduler = Scheduler(policy, machine.blocks, machine.block_size)
            made.append(Instance(clock, scheduler, SimExecutor(clock, machine.cost), machine.ahead, leaps))
    return Cluster(clock, made, PLACEMENTS[place]())
