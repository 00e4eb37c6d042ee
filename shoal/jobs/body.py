"""The fields of a request's body: OpenAI's and vLLM's names, types and ranges, as msgspec structs.

It must not know what a field does to the answer. A field of type None is one that this version cannot honour.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Raw

INT64 = 2**63

Probability = Annotated[float, Meta(gt=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TopCount = Annotated[int, Meta(ge=0, le=20)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Word = Annotated[str, Meta(min_length=1)]
Words = Annotated[list[Word], Meta(max_length=16)]
TokenIds = Annotated[list[int], Meta(max_length=4096)]
Empty = Annotated[list[Any], Meta(max_length=0)]
NoObject = Annotated[dict[str, Any], Meta(max_length=0)]


Schema = dict[str, Any] | bool | str  # a JSON schema, or its text


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A free answer."""


class ObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's wrapping of a schema."""

    schema: Schema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: NamedSchema


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's field for constraints: one of the first five."""

    json: Schema | None = None
    json_object: bool | None = None
    regex: Word | None = None
    choice: list[str] | None = None
    grammar: Word | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    # Refused unless they ask for nothing.
    disable_additional_properties: Literal[False] | None = None
    structural_tag: None = None
    # Ignored: there is one way to keep a constraint here.
    disable_fallback: Raw = Raw()
    backend: Raw = Raw()


class RepetitionDetection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's: an answer ends when a piece of so many tokens has come so many times over. 0 and 0 is none."""

    max_pattern_size: Annotated[int, Meta(ge=0, le=4096)] = 0
    min_pattern_size: Annotated[int, Meta(ge=0, le=4096)] = 0
    min_count: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; only text is read."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that a model may call."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of an object
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: Function


class ChosenFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function by its name."""

    name: str


class NamedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The wish that one function be called."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that was called, with its arguments as JSON or as its text."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None  # None only beside tool calls
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None
    annotations: Raw = Raw()


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a chat and a completion have in common. None is the same as absent."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    logit_bias: dict[int, Bias] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    stop: Word | Words | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Word], Meta(max_length=1024)] | None = None
    prompt_logprobs: TopCount | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Word | None = None
    response_format: TextFormat | ObjectFormat | JsonFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Word | None = None
    guided_choice: list[str] | None = None
    guided_grammar: Word | None = None
    guided_whitespace_pattern: str | None = None
    timeout: Annotated[float, Meta(gt=0.0)] | None = None
    repetition_detection: RepetitionDetection | None = None
    # Refused unless they ask for nothing: honouring them in part would change what an answer means.
    stream: bool | None = None
    use_beam_search: bool | None = None
    logits_processors: Empty | None = None
    logprob_token_ids: Empty | None = None
    prompt_embeds: None = None
    thinking_token_budget: None = None
    vllm_xargs: NoObject | None = None
    kv_transfer_params: NoObject | None = None
    # Ignored: they change neither the tokens nor their number.
    stream_options: Raw = Raw()
    user: Raw = Raw()
    metadata: Raw = Raw()
    store: Raw = Raw()
    service_tier: Raw = Raw()
    safety_identifier: Raw = Raw()
    prompt_cache_key: Raw = Raw()
    prompt_cache_options: Raw = Raw()
    prompt_cache_retention: Raw = Raw()
    moderation: Raw = Raw()
    priority: Raw = Raw()
    request_id: Raw = Raw()
    length_penalty: Raw = Raw()
    early_stopping: Raw = Raw()
    spaces_between_special_tokens: Raw = Raw()
    guided_decoding_backend: Raw = Raw()


class ChatBody(Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    documents: Empty | None = None
    chat_template: None = None
    web_search_options: None = None
    verbosity: None = None
    mm_processor_kwargs: NoObject | None = None
    media_io_kwargs: NoObject | None = None
    prediction: Raw = Raw()
    include_reasoning: Raw = Raw()


class CompletionBody(Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/completions. The prompt is a text, texts, a list of token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: TopCount | None = None
    echo: bool | None = None
    score_from: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None  # Shoal's own: what stands before is not scored
    best_of: int | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None


class VectorBody(Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What bodies have in common that ask for numbers and not for a text: what makes a text has no meaning in them."""

    echo: ClassVar[None] = None
    logprobs: ClassVar[None] = None

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether a field means anything here."""
        return name in _VECTOR or name in _IGNORED or (name in cls.__struct_fields__ and name not in _COMMON)


class EmbeddingBody(VectorBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/embeddings. The input is what the prompt of a completion is."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


class ClassifyBody(VectorBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /classify: an input, or one chat."""

    input: str | list[str | int | list[int]] | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    use_activation: bool | None = None


class PoolingBody(ClassifyBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /pooling: the same, for whatever vector the model makes."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    task: Literal["embed", "classify"] | None = None


Texts = str | list[str]


class PairBody(VectorBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What bodies have in common that ask how two texts go together. One first text goes with every second one."""

    documents: Texts | None = None
    use_activation: bool | None = None
    max_tokens_per_query: Count | None = None
    max_tokens_per_doc: Count | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def has(cls, name: str) -> bool:
        """As above; special tokens are what joins a pair."""
        return name != "add_special_tokens" and super().has(name)


class ScoreBody(PairBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /score. vLLM has four pairs of names for the two texts."""

    queries: Texts | None = None
    items: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankBody(PairBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of /rerank."""

    query: str
    top_n: Count | None = None


class PassedBody(Body, frozen=True, kw_only=True):
    """What is read of a body that a server answers: of the fields above `model` and `timeout` alone. The server gets
    all of it but `timeout`, which is Shoal's own."""

    url: str
    sent: bytes  # with the job's defaults where the row is silent
    echo: ClassVar[None] = None
    logprobs: ClassVar[None] = None


_VECTOR = frozenset("model truncate_prompt_tokens add_special_tokens".split())
_COMMON = frozenset(Body.__struct_fields__)
_IGNORED = frozenset(each.name for each in msgspec.structs.fields(Body) if isinstance(each.default, Raw))

UNSUPPORTED = frozenset(
    "stream use_beam_search logits_processors logprob_token_ids prompt_embeds thinking_token_budget vllm_xargs"
    " kv_transfer_params echo functions function_call modalities audio documents"
    " chat_template"
    " web_search_options verbosity mm_processor_kwargs media_io_kwargs suffix refusal".split()
)
"""Fields that are known, and refused with any value that asks for something."""

KINDS: tuple[type[Body], ...] = (
    ChatBody, CompletionBody, EmbeddingBody, ClassifyBody, PoolingBody, ScoreBody, RerankBody
)  # fmt: skip
"""Every kind of body that is computed here."""

FIELDS = frozenset(name for body in KINDS for name in body.__struct_fields__)
"""Every field that a body may have."""

TEXT_FIELDS = frozenset(name for body in (ChatBody, CompletionBody) for name in body.__struct_fields__)
"""Those of bodies that ask for texts."""

GIVEN = frozenset("messages prompt input query queries documents items text_1 text_2 data_1 data_2".split())
"""Fields that hold what a row is about: no other row can say it."""

IGNORED = frozenset(
    each.name for kind in (ChatBody, CompletionBody) for each in msgspec.structs.fields(kind) if each.type is Raw
)
"""Fields that may say anything, for they change neither the tokens nor their number."""
