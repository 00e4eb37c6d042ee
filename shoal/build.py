"""From a configuration to a running engine: the one place that knows both halves, and where the wall clock lives.

It must not decide anything while the engine runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal import kernels as backends
from shoal.core.config import EngineConfig
from shoal.core.errors import ModelError, UsageError
from shoal.engine import Engine
from shoal.kernels import Kernels
from shoal.nn.adapter import Adapter, load_adapter
from shoal.nn.arch import ModelConfig, make_config, read_values
from shoal.nn.decoder import Decoder
from shoal.nn.encoder import Encoder
from shoal.nn.encoder_arch import EncoderConfig, encoder_shapes, make_encoder_config
from shoal.nn.masks import Masks
from shoal.nn.weights import KV_DTYPES, MODES, load_encoder_weights, load_weights, model_bytes, tensor_bytes
from shoal.runtime.encoder_runner import EncoderRunner
from shoal.runtime.memory import MemoryPlan, available_bytes, plan_memory, plan_weights
from shoal.runtime.runner import ModelRunner
from shoal.sched.policies import find_policy
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policies.stall_free import StallFree
from shoal.sched.policies.whole import WholePolicy
from shoal.sched.policy import Budget, Policy
from shoal.sched.scheduler import Scheduler
from shoal.text.checkpoint import kv_mode, resolve_model, weight_mode
from shoal.text.grammar import Grammars
from shoal.text.pooling import FIRST, Pooling, decoder_pooling, is_encoder, read_pooling
from shoal.text.tokenizer import Tokenizer

_LEAST_TOKENS = 2048  # without --memory, the KV memory must hold a row of this length (or of the whole context)


class WallClock:
    """Seconds since the computer started; never goes back."""

    def now(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What was found out while building. Names of backends are the ones chosen where the configuration said auto."""

    folder: Path
    architecture: str
    context: int  # tokens
    vocab_size: int  # rows of the embedding
    weights: str
    kv: str
    kernels: str
    device: str
    threads: int
    block_size: int  # tokens
    memory: MemoryPlan
    load_seconds: float


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine with what it stands on. Close it when done."""

    engine: Engine
    facts: EngineFacts
    runner: ModelRunner | EncoderRunner
    kernels: Kernels

    def close(self) -> None:
        """Wait for the step in flight and end the kernels' thread."""
        self.runner.close()


def build_engine(
    config: EngineConfig, useful_tokens: int | None = None, tokenizer: Tokenizer | None = None, share: int = 1,
    kv_bytes: int | None = None,
) -> BuiltEngine:  # fmt: skip
    """Load the model and put an engine around it.

    `useful_tokens` bounds the KV memory: what the work at hand can fill at most, if known. Constraints speak of the
    texts of `tokenizer`, by default the model's own. So many engines `share` what memory is free; one in place of
    another, which had `kv_bytes` for keys and values, is given at most as many. ModelError or UsageError says what is
    wrong with the checkpoint, the device or the memory.
    """
    began = time.monotonic()
    folder = resolve_model(config.model)
    values = read_values(folder)
    if is_encoder(values):
        return _build_encoder(config, folder, make_encoder_config(values), began, 1 if kv_bytes is not None else share)
    model = make_config(values, config.context)
    pooling = None if model.labels else decoder_pooling(folder)
    normalize = isinstance(pooling, Pooling) and pooling.normalize
    mode = weight_mode(config.weights, folder)
    kv_name = kv_mode(config.kv, mode)
    kv_dtype = KV_DTYPES[kv_name]
    kernels = _load_kernels(config)
    adapters = _adapters(config, model, mode)
    block = model.num_layers * kernels.kv_bytes(config.block_size, model.num_kv_heads, model.head_dim, kv_dtype)
    weights = model_bytes(model, mode) + sum(each.num_bytes for each in adapters)
    available = available_bytes(kernels.device) // (share if kv_bytes is None else 1)
    memory = _memory(config, model, weights, block, available, useful_tokens, kv_bytes)
    decoder = Decoder(model, load_weights(folder, model, *MODES[mode]), kernels, adapters, kv_dtype)
    kv = decoder.new_kv(memory.num_blocks, config.block_size)

    def grammars() -> Grammars:
        return Grammars(tokenizer or Tokenizer.load(folder), model.vocab_size)

    runner = ModelRunner(
        decoder, kernels, kv, model.vocab_size, tuple(config.adapters), Masks(grammars), normalize, bool(model.labels)
    )
    remedy = "raise --memory" if share == 1 else f"raise --memory, or name fewer devices: {share} share one memory"
    scheduler = Scheduler(make_policy(config), memory.num_blocks, config.block_size, config.reuse, remedy)
    facts = EngineFacts(
        folder=folder, architecture=model.architecture, context=model.context, vocab_size=model.vocab_size,
        weights=mode, kv=kv_name, kernels=kernels.name, device=config.device, threads=torch.get_num_threads(),
        block_size=config.block_size, memory=memory, load_seconds=time.monotonic() - began,
    )  # fmt: skip
    return BuiltEngine(Engine(scheduler, runner, WallClock(), int(config.overlap)), facts, runner, kernels)


def _build_encoder(
    config: EngineConfig, folder: Path, model: EncoderConfig, began: float, share: int
) -> BuiltEngine:  # fmt: skip
    """An engine over an encoder: whole texts, no keys and values. A block stands for a seat and holds any text."""
    if config.policy != "auto" or config.adapters:
        raise UsageError("an encoder takes neither a policy nor adapters: leave them out")
    pooling = FIRST if model.labels else read_pooling(folder)
    context = min(config.context or model.context, pooling.most_tokens or model.context, model.context)
    mode = weight_mode(config.weights, folder)
    kernels = _load_kernels(config)
    limit = Budget(max(config.step_tokens, context), config.max_sequences)
    memory = plan_weights(
        available_bytes(kernels.device) // share, tensor_bytes(encoder_shapes(model), mode), 2 * limit.sequences
    )
    weights = load_encoder_weights(folder, model, *MODES[mode])
    encoder = Encoder(model, weights, kernels, pooling.kind, pooling.normalize)
    runner = EncoderRunner(encoder, kernels.device, model.num_words)
    scheduler = Scheduler(WholePolicy(limit, context), memory.num_blocks, context, reuse=False)
    facts = EngineFacts(
        folder=folder, architecture=model.architecture, context=context, vocab_size=model.vocab_size, weights=mode,
        kv="", kernels=kernels.name, device=config.device, threads=torch.get_num_threads(), block_size=context,
        memory=memory, load_seconds=time.monotonic() - began,
    )  # fmt: skip
    return BuiltEngine(Engine(scheduler, runner, WallClock(), int(config.overlap)), facts, runner, kernels)


def make_policy(config: EngineConfig) -> Policy:
    """The policy of a configuration; UsageError for a name or an import path that leads to none."""
    limit = Budget(config.step_tokens, config.max_sequences)
    if config.policy == "auto":
        return BatchPolicy(limit)
    try:
        found = find_policy(config.policy)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if found is StallFree:  # without a cost and a promise it would be first come, first served by another name
        raise UsageError(
            f"policy {config.policy!r} cuts steps to keep promises by what steps cost, and rows of a job are promised "
            "nothing: leave it out, or name a class of your own (module:Class) that gives it a cost and a promise"
        )
    return found(limit)


def _load_kernels(config: EngineConfig) -> Kernels:
    _check_device(config.device)
    try:
        kernels = backends.load(config.kernels, config.device, config.threads)
        kernels.new_kv(1, 1, config.block_size, 1, 1, torch.float32)  # refuses a page size it cannot have
    except ValueError as error:
        raise UsageError(str(error)) from error
    return kernels


def _check_device(name: str) -> None:
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device {name} is not there: torch sees {torch.cuda.device_count()} such devices; use cpu")


def _adapters(config: EngineConfig, model: ModelConfig, mode: str) -> list[Adapter]:
    """The adapters in the order of the configuration, opened and checked. ModelError names the one that is wrong."""
    found = []
    for name, folder in config.adapters.items():
        try:
            found.append(load_adapter(Path(folder).expanduser(), model, MODES[mode][0]))
        except ModelError as error:
            raise ModelError(f"adapter {name}: {error}") from error
    return found


def _memory(
    config: EngineConfig, model: ModelConfig, weights: int, block: int, available: int, useful_tokens: int | None,
    kv_bytes: int | None,
) -> MemoryPlan:  # fmt: skip
    """`weights`, `block` and `available` are bytes: of all that is loaded, of a block of keys and values in all layers,
    and of what there is; `kv_bytes`, if known, of the most that keys and values may take where nobody says."""
    useful = useful_tokens if useful_tokens is not None else config.max_sequences * model.context
    useful_blocks = -(-useful // config.block_size) + config.max_sequences  # a row's last block is seldom full
    if kv_bytes is not None:
        useful_blocks = min(useful_blocks, kv_bytes // block)
    return plan_memory(
        available=available,
        weights=weights,
        block=block,
        asked=config.memory_bytes,
        useful_blocks=useful_blocks,
        least_blocks=1 if config.memory_bytes else -(-min(model.context, _LEAST_TOKENS) // config.block_size),
    )
