"""How long a step takes on a machine that need not be here: operations and bytes against what the machine can do.

It knows a machine's numbers and a model's shape; it must not know policies, requests or the clock. The roofline is that
of Williams et al. (2009), product by product, with the few things that serving adds: tiles of tokens, keys and values,
devices that share a layer (tensor parallel) or follow each other (pipeline), experts, and fixed times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from shoal.core.types import Step
from shoal.sim.hardware import Hardware, Wire
from shoal.sim.shapes import Product, Shape

LIGHT_KERNELS = 5  # of a layer beside its products and its attention: two norms, rotation, activation, sums
NUMBER = 2  # bytes of an activation


class Load(NamedTuple):
    """What a step asks for, whatever the model. Positions that rows look at count for each of them, or once."""

    tokens: float  # computed
    rows: float  # that get a token
    pairs: float = 0.0  # query-key pairs of rows that compute several tokens
    read: float = 0.0  # positions that those look at
    decodes: float = 0.0  # positions that rows which compute one token look at


class Parts(NamedTuple):
    """The seconds of a step by what they go to, in all layers of all stages."""

    products: float
    light: float  # norms, rotations, activations, sums
    attention: float
    wires: float
    head: float
    fixed: float


def load_of(step: Step, window: int = 0, block: int = 0) -> Load:
    """What the step asks for. With `block`, a block of so many positions that several rows look at counts once."""
    tokens = rows = 0
    pairs = read = decodes = 0.0
    for part in step.slices:
        count = len(part.tokens) + part.draft
        seen = part.start + count
        near = min(seen, window + count - 1) if window else seen
        tokens += count
        rows += part.want > 0
        if count == 1:
            decodes += near
        else:
            read += near
            pairs += count * (part.start + (count + 1) / 2) if near == seen else count * min(window, seen)
    if block and (looked := read + decodes):
        distinct = block * len({each for part in step.slices for each in part.blocks})
        once = min(1.0, distinct / looked)
        read, decodes = once * read, once * decodes
    return Load(tokens, rows, pairs, read, decodes)


def all_reduce(wire: Wire, devices: int, size: float) -> float:
    """Seconds until all of so many devices have the sum of their `size` bytes: two rounds of a ring."""
    if devices == 1:
        return 0.0
    moved = 2 * (devices - 1) / devices * size
    return send(wire, moved)


def send(wire: Wire, size: float) -> float:
    """Seconds until `size` bytes have reached the next device."""
    if size <= wire.small:
        return wire.soon + size / (wire.bandwidth * wire.soon_share)
    return wire.latency + size / (wire.bandwidth * wire.share)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The cost of steps of one model on one group of devices: `tensor` of them share each layer, and `pipeline` such
    groups follow each other. `block`: positions of a block, where the kernels read one once for all rows that look."""

    hardware: Hardware
    shape: Shape
    tensor: int = 1
    pipeline: int = 1
    weight_bytes: float = 2.0  # of a number
    kv_bytes: float = 2.0
    arithmetic: str = "bf16"
    block: int = 0

    def seconds(self, step: Step) -> float:
        """Predicted duration of the step alone: through all stages, one after the other."""
        return sum(self.stage_seconds(self.load(step)))

    def load(self, step: Step) -> Load:
        """What the step asks for."""
        return load_of(step, self.shape.window, self.block)

    def stages(self, step: Step) -> tuple[float, ...]:
        """Seconds of the step on each stage, with what it takes to send it on."""
        return self.stage_seconds(self.load(step))

    def stage_seconds(self, load: Load) -> tuple[float, ...]:
        """The same of a load."""
        parts, count, fixed = self.parts(load), self.pipeline, self.hardware.efficiency
        if count == 1:
            return (sum(parts),)
        answers = parts.head + fixed.row * load.rows
        even = (sum(parts) - answers - fixed.step) / count
        return (*(even + fixed.step,) * (count - 1), even + fixed.step + answers)

    def parts(self, load: Load) -> Parts:
        """Where the seconds go."""
        fixed, layers = self.hardware.efficiency, self.shape.layers
        products, light = (layers * each for each in self.layer_seconds(load.tokens))
        attention, wires = layers * self._attention(load), self._wires(load.tokens)
        late = max(layers * fixed.layer - products - light - attention - wires, 0.0)
        head = self.product(Product("head", self.shape.width, -(-self.shape.vocabulary // self.tensor)), load.rows)
        return Parts(products, light, attention, wires, head, late + fixed.step + fixed.row * load.rows)

    def product(self, product: Product, tokens: float, times: float = 1.0) -> float:
        """Seconds of `times` products of so many tokens each."""
        if not tokens:
            return 0.0
        machine, kept = self.hardware, self.hardware.efficiency
        size = product.inputs * product.outputs
        tokens = tiled(tokens, machine.tile)
        computing = times * 2 * tokens * size / (machine.peak[self.arithmetic] * kept.compute)
        moved = size * self.weight_bytes + tokens * (product.inputs + product.outputs) * NUMBER
        reading = times * moved / (machine.bandwidth * kept.memory)
        longer, shorter = max(computing, reading), min(computing, reading)
        return longer + (1 - kept.hidden) * shorter + kept.kernel

    def layer_seconds(self, tokens: float) -> tuple[float, float]:
        """Seconds of a layer's products with so many tokens, and of all else but its attention and its wires."""
        return sum(self._products(tokens)), self._light(tokens)

    def _products(self, tokens: float) -> list[float]:
        shape = self.shape
        found = [self.product(each, tokens) for each in shape.products(self.tensor)]
        touched = shape.touched(tokens)
        each_has = tokens * shape.chosen / touched if shape.experts > 1 else tokens
        return found + [self.product(each, each_has, touched) for each in shape.forward(self.tensor)]

    def light_bytes(self) -> dict[str, float]:
        """Bytes that a token moves in each of a layer's light kernels."""
        shape, tensor = self.shape, self.tensor
        rotated = (shape.heads + shape.kv_heads) / tensor * shape.head_dim
        inner = shape.inner * shape.chosen / tensor
        return {
            "norm before attention": 2 * shape.width * NUMBER,
            "rotation": 2 * rotated * NUMBER,
            "norm before feed-forward": 2 * shape.width * NUMBER,
            "activation": (2 + shape.gated) * inner * NUMBER,
            "sum": 3 * shape.width * NUMBER,
        }

    def _light(self, tokens: float) -> float:
        machine = self.hardware
        moved = tokens * sum(self.light_bytes().values())
        kept = machine.efficiency
        return moved / (machine.bandwidth * kept.light) + LIGHT_KERNELS * kept.kernel

    def _attention(self, load: Load) -> float:
        shape, machine = self.shape, self.hardware
        kept = machine.efficiency
        operations = 4 * shape.heads * shape.head_dim / self.tensor
        position = shape.kv_numbers(self.tensor) * self.kv_bytes
        peak, bandwidth = machine.peak[self.arithmetic] * kept.attention, machine.bandwidth * kept.reading
        prompts = max(load.pairs * operations / peak, load.read * position / bandwidth)
        answers = max(load.decodes * operations / peak, load.decodes * position / bandwidth)
        return prompts + answers + kept.kernel * ((load.pairs > 0) + (load.decodes > 0))

    def _wires(self, tokens: float) -> float:
        size = tokens * self.shape.width * NUMBER
        machine = self.hardware
        joint = machine.near if self.tensor <= machine.devices else machine.joint
        found = 2 * self.shape.layers * all_reduce(joint, self.tensor, size)
        if self.pipeline > 1:
            wire = machine.near if self.tensor * self.pipeline <= machine.devices else machine.far
            found += self.pipeline * send(wire, size)  # what was sampled goes back to the first
        return found

    @property
    def weights(self) -> float:
        """Bytes of weights on the fullest device."""
        layers = math.ceil(self.shape.layers / self.pipeline) * self.shape.layer_parameters
        ends = (1 if self.shape.tied else 2) * self.shape.vocabulary * self.shape.width
        return self.weight_bytes * (layers + (ends if self.pipeline == 1 else ends / 2)) / self.tensor

    @property
    def positions(self) -> int:
        """Positions whose keys and values have room beside the weights; 0 where the weights have none."""
        room = self.hardware.memory * self.hardware.usable - self.weights
        layers = math.ceil(self.shape.layers / self.pipeline)
        return max(0, int(room / (layers * self.shape.kv_numbers(self.tensor) * self.kv_bytes)))


def tiled(tokens: float, tile: int) -> float:
    """Tokens that are computed for so many: whole tiles. Kernels for fewer tokens have smaller ones, down to 16."""
    while tile > 16 and tokens <= tile // 2:
        tile //= 2
    return math.ceil(tokens / tile) * tile if tile > 1 else tokens
