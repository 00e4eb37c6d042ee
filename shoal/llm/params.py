"""SamplingParams with vLLM's names and meanings, and what they become for the engine.

It must not know prompts, texts of answers or how an engine runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from shoal.core.errors import UsageError
from shoal.core.types import Constraint, Sampling
from shoal.llm.structured import constraint_of
from shoal.text.checkpoint import ModelInfo
from shoal.text.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5  # a temperature below this is greedy, as in vLLM
_BIAS_LIMIT = 100.0  # biases are cut to this, as in vLLM
_UNAVAILABLE = (
    "logprob_token_ids", "flat_logprobs", "truncate_prompt_tokens",
    "skip_reading_prefix_cache", "thinking_token_budget", "repetition_detection", "extra_args", "logits_processors",
    "best_of",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How answers are sampled; the defaults are vLLM's. UsageError names a value out of range or not available.

    It may be changed until it is used, as vLLM's callers do with the model's defaults.
    """

    n: int = 1  # answers for each prompt
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    seed: int | None = None  # None: made of the engine's seed and the prompt's number
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: the rest of the context
    min_tokens: int = 0
    logprobs: int | None = None  # best tokens reported beside each sampled one; -1: all
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # for vLLM's callers; a text is what its tokenizer decodes
    include_stop_str_in_output: bool = False
    output_kind: object = None  # for vLLM's callers; answers come when they are finished
    logit_bias: Mapping[int, float] | None = None  # keys may be strings of digits, as in JSON
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: object = None  # StructuredOutputsParams, or a mapping of its fields
    guided_decoding: object = None  # the same under its older name
    # Known to vLLM and not available here: anything but None is refused, so that nothing is silently left out.
    logprob_token_ids: object = field(default=None, repr=False)
    flat_logprobs: object = field(default=None, repr=False)
    truncate_prompt_tokens: object = field(default=None, repr=False)
    skip_reading_prefix_cache: object = field(default=None, repr=False)
    thinking_token_budget: object = field(default=None, repr=False)
    repetition_detection: object = field(default=None, repr=False)
    extra_args: object = field(default=None, repr=False)
    logits_processors: object = field(default=None, repr=False)
    best_of: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise UsageError for the first value that cannot be had."""
        for name in _UNAVAILABLE:
            if getattr(self, name) not in (None, False):
                raise UsageError(f"SamplingParams: {name} is not available in this engine; leave it out")
        if self.structured_outputs is not None and self.guided_decoding is not None:
            raise UsageError("SamplingParams: structured_outputs and guided_decoding are one thing: keep one")
        self.constraint()
        for name, ok, must in self._checks():
            if not ok:
                raise UsageError(f"SamplingParams: {name} is {getattr(self, name)!r}; it must be {must}")

    def _checks(self) -> list[tuple[str, bool, str]]:
        """Name, whether it is well, and what it must be."""
        return [
            ("n", self.n >= 1, "at least 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "greater than 0"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 or 0 for all, or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "from 0 to max_tokens"),
            ("logprobs", self.logprobs is None or self.logprobs >= -1, "at least 0, or -1 for all"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= -1, "at least 0, or -1"),
            ("stop", all(self.stops), "without empty strings"),
            ("detokenize", self.detokenize or not self.stops, "true with stop strings"),
        ]

    def constraint(self) -> Constraint | None:
        """What the text of an answer must be."""
        return constraint_of(self.structured_outputs if self.structured_outputs is not None else self.guided_decoding)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def clone(self) -> SamplingParams:
        """A copy that may be changed."""
        return replace(self)

    @classmethod
    def from_optional(cls, **values: object) -> SamplingParams:
        """As the constructor, with None for "not said", as in vLLM."""
        return cls(**{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


def default_params(info: ModelInfo) -> SamplingParams:
    """What a caller without parameters gets: the model's generation_config.json over vLLM's defaults."""
    known = {each.name for each in fields(SamplingParams)}
    values: dict[str, object] = {name: value for name, value in info.sampling.items() if name in known}
    if "top_k" in values:
        values["top_k"] = int(info.sampling["top_k"])
    if info.max_tokens is not None:
        values["max_tokens"] = info.max_tokens
    return SamplingParams(**values)  # type: ignore[arg-type]  # names were compared, values checked by ModelInfo


def make_sampling(
    params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer, num_prompt: int, seed: int
) -> Sampling:
    """The engine's form, for sample 0 of a prompt of that many tokens. UsageError for a value out of range."""
    params.check()
    greedy = params.temperature < GREEDY_BELOW
    room = info.context - num_prompt
    stop = frozenset(_ids("stop_token_ids", params.stop_token_ids, info))
    bias = {int(token): float(value) for token, value in (params.logit_bias or {}).items()}
    _ids("logit_bias", list(bias), info)
    return Sampling(
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        min_tokens=params.min_tokens,
        stop=stop if params.ignore_eos else stop | info.eos,
        temperature=0.0 if greedy else params.temperature,
        top_k=0 if greedy else max(params.top_k, 0),
        top_p=1.0 if greedy else params.top_p,
        min_p=0.0 if greedy else params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(sorted((i, min(max(v, -_BIAS_LIMIT), _BIAS_LIMIT)) for i, v in bias.items())),
        allowed=tuple(sorted(set(_ids("allowed_token_ids", params.allowed_token_ids, info)))),
        banned=_banned(params.bad_words or (), tokenizer),
        seed=seed,
        logprobs=count_best(params.logprobs, info),
    )


def count_best(asked: int | None, info: ModelInfo) -> int:
    """How many best tokens to report: -1 for no log-probabilities at all. vLLM's -1 means every token."""
    if asked is None:
        return -1
    return info.vocab_size if asked == -1 else asked


def row_seed(engine_seed: int, number: int) -> int:
    """The seed of prompt `number` of an engine's life, where its parameters name none."""
    return int.from_bytes(hashlib.blake2b(f"{engine_seed}\0{number}".encode(), digest_size=8).digest(), "big") >> 1


def _ids(name: str, ids: Sequence[int] | None, info: ModelInfo) -> Sequence[int]:
    for token in ids or ():
        if not 0 <= token < info.vocab_size:
            raise UsageError(f"SamplingParams: token {token} in {name} is outside the vocabulary of {info.vocab_size}")
    return ids or ()


def _banned(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words, at the start of a text and, where the tokenizer tells them apart, inside it."""
    banned: list[tuple[int, ...]] = []
    for word in words:
        bare, spaced = (tuple(tokenizer.encode(space + word.lstrip(), special=False)) for space in ("", " "))
        banned.append(bare)
        if bare and spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            banned.append(spaced)
    return tuple(sequence for sequence in banned if sequence)
