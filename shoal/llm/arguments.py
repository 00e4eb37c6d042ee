"""vLLM's constructor arguments, as this engine's configuration.

The rule: an argument that this engine has under another name is translated; one that only tells vLLM how to use its
machine is ignored with a warning; one that would change answers, or promises what is not here, is refused unless it
has its neutral value. It must not know how the configuration is used.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace

from shoal.core.config import EngineConfig
from shoal.core.errors import UsageError

_TRANSLATED = {
    "max_model_len": "context", "max_num_seqs": "max_sequences", "max_num_batched_tokens": "step_tokens",
    "enable_prefix_caching": "reuse", "kv_cache_memory_bytes": "memory_bytes", "async_scheduling": "overlap",
    "kv_cache_dtype": "kv",
}  # fmt: skip
_DTYPES = {"auto": "auto", "float32": "fp32", "float": "fp32", "bfloat16": "bf16", "fp32": "fp32", "bf16": "bf16"}
_IGNORED = (
    "gpu_memory_utilization", "cpu_offload_gb", "swap_space", "enforce_eager", "disable_log_stats", "load_format",
    "max_seq_len_to_capture", "compilation_config", "enable_chunked_prefill", "disable_custom_all_reduce",
    "served_model_name", "distributed_executor_backend", "trust_remote_code", "hf_token", "download_dir",
    "max_loras", "max_lora_rank", "scheduling_policy", "tokenizer_mode",
)  # fmt: skip
_REFUSED: Mapping[str, tuple[object, ...]] = {  # with their neutral values
    "tensor_parallel_size": (1,), "pipeline_parallel_size": (1,), "data_parallel_size": (1,),
    "quantization": (None,), "enable_lora": (False, True, None), "hf_overrides": (None, {}),
    "skip_tokenizer_init": (False,),
    "logits_processors": (None, []), "structured_outputs_config": (None, {}),
    "speculative_config": (None, {}), "runner": ("auto", "generate"), "task": (None, "auto", "generate"),
    "convert": ("auto", "none", None), "allowed_local_media_path": ("", None), "tokenizer_revision": (None,),
}  # fmt: skip
_OWN = frozenset(each.name for each in fields(EngineConfig)) - {"model"}


def make_config(model: str, dtype: str, seed: int | None, arguments: Mapping[str, object]) -> EngineConfig:
    """The configuration that vLLM's arguments ask for; names of EngineConfig itself are taken too.

    UsageError for a name nobody knows (with the nearest one) and for what cannot be had here.
    """
    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be auto, float32 or bfloat16")
    values: dict[str, object] = {}
    ignored = []
    for name, value in arguments.items():
        if name in _TRANSLATED:
            if value is not None:
                values[_TRANSLATED[name]] = value
        elif name == "adapters" and isinstance(value, Mapping):
            values[name] = {adapter: str(folder) for adapter, folder in value.items()}
        elif name in _OWN:
            values[name] = value
        elif name in _REFUSED:
            if value not in _REFUSED[name]:
                raise UsageError(f"LLM: {name}={value!r} is not available here; leave it out")
        elif name in _IGNORED:
            ignored.append(name)
        else:
            raise UsageError(f"LLM: unknown argument {name!r}{_hint(name)}")
    if ignored:
        warnings.warn(f"LLM: ignored, as this engine has no use for them: {', '.join(ignored)}", stacklevel=3)
    config = EngineConfig.from_mapping({"model": model, "seed": seed or 0, **values})
    weights = _DTYPES[str(dtype).removeprefix("torch.")]
    return config if weights == "auto" else replace(config, weights=weights)


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, [*_TRANSLATED, *_OWN, *_REFUSED, *_IGNORED], n=1)
    return f": did you mean {near[0]!r}?" if near else "; see the documentation of LLM"
