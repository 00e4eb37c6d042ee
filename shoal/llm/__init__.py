"""`LLM(...).generate` and `.chat` in this process, with vLLM's names and meanings.

It knows texts, parameters and one engine's loop; it must not know steps, blocks or tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.progress import Progress

from shoal.build import build_engine
from shoal.core.errors import RowError, UsageError
from shoal.core.types import TOKEN, Tokens
from shoal.llm.arguments import make_config
from shoal.llm.loop import Loop, Task
from shoal.llm.outputs import CompletionOutput, Logprob, RequestOutput
from shoal.llm.params import SamplingParams, default_params, make_sampling, row_seed
from shoal.llm.structured import StructuredOutputsParams
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import ModelInfo, resolve_model
from shoal.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

Prompt = str | Sequence[int] | Mapping[str, Any]  # a text, token ids, {"prompt": …} or {"prompt_token_ids": […]}
Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = Any  # None, a name, anything with a lora_name, or a list of these

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
WINDOW = 1024  # prompts in the engine at a time: enough to fill every step, few enough to plan quickly


class LLM:
    """A model that answers, for one thread at a time. `model` is a folder or hub id; '' is the embedded model.

    `adapters` are folders of LoRA adapters by name. Further arguments are vLLM's or fields of EngineConfig:
    `arguments.make_config` has the rule for each.
    """

    def __init__(
        self,
        model: str = "",
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        seed: int | None = 0,
        revision: str | None = None,
        chat_template: str | None = None,
        **arguments: object,
    ) -> None:
        config = make_config(str(model), dtype, seed, arguments)
        folder = resolve_model(config.model, revision)
        self.config = replace(config, model=str(folder))
        words = resolve_model(tokenizer, revision) if tokenizer else folder
        self._tokenizer = Tokenizer.load(words)
        self._template = self._with_source(ChatTemplate.load(words), chat_template)
        self._info = ModelInfo.load(folder, self._tokenizer, self.config.context)
        self._built = build_engine(self.config, tokenizer=self._tokenizer)
        self.facts = self._built.facts
        self._loop = Loop(self._built.engine, self._tokenizer, self._info)
        self._count = 0  # prompts taken so far

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        priority: None = None,
    ) -> list[RequestOutput]:
        """An output for each prompt, in their order. A prompt that cannot be run has one with finish_reason "error".

        Without parameters the model's own defaults hold. `lora_request` names an adapter for all prompts, or one (or
        None) for each; vLLM's LoRARequest stands for its name. Prompts run in the order of their common beginnings.
        """
        _refuse(priority=priority)
        return self._run_all(_prompt_list(prompts), sampling_params, use_tqdm, True, lora_request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them, written by the model's chat template."""
        template = self._with_source(self._template, chat_template)
        chats: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts: list[Prompt | RowError] = []
        for each in chats:
            try:
                text = template.render(each, add_generation_prompt, continue_final_message, tools, chat_template_kwargs)
                prompts.append(text)
            except RowError as error:
                prompts.append(error)
        return self._run_all(prompts, sampling_params, use_tqdm, False, lora_request)

    def generate_iter(
        self, prompts: Iterable[Prompt], sampling_params: SamplingParams | None = None, *, window: int = WINDOW
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish, from prompts taken as there is room: at most `window` are under way.

        request_id counts this object's prompts in the order they were taken. Leaving the iterator cancels the rest.
        """
        if window < 1:
            raise UsageError(f"window is {window}; it must be at least 1")
        params = (sampling_params or self.get_default_sampling_params()).clone()
        make_sampling(params, self._info, self._tokenizer, 1, 0)  # what is wrong for every prompt is refused here
        return self._loop.run((self._task(each, self._encode(each, True), params) for each in prompts), window)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer: encode, decode and the ids with a role."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What callers without parameters get: the model's generation_config.json over vLLM's defaults."""
        return default_params(self._info)

    def close(self) -> None:
        """End the engine. Nothing may be generated after."""
        self._built.close()

    # -- from prompts to tasks -----------------------------------------------------------------------

    def _run_all(
        self, prompts: Sequence[Prompt | RowError], sampling_params: Params, use_tqdm: bool, special: bool,
        lora_request: Adapters,
    ) -> list[RequestOutput]:  # fmt: skip
        params = self._params_list(sampling_params, len(prompts))
        adapters = _adapter_names(lora_request, len(prompts))
        encoded = self._encode_all(prompts, special)
        tasks = [self._task(*each) for each in zip(prompts, encoded, params, adapters, strict=True)]
        place = {task.request_id: number for number, task in enumerate(tasks)}
        tasks.sort(key=_beginning)
        ordered = (replace(task, index=index) for index, task in enumerate(tasks))
        results: list[RequestOutput | None] = [None] * len(tasks)
        with Progress(disable=not use_tqdm, transient=True) as progress:
            bar = progress.add_task("Processed prompts", total=len(tasks))
            for output in self._loop.run(ordered, WINDOW):
                results[place[output.request_id]] = output
                progress.advance(bar)
        return [output for output in results if output is not None]

    def _params_list(self, params: Params, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            each = params or self.get_default_sampling_params()
            make_sampling(each, self._info, self._tokenizer, 1, 0)
            return [each] * count
        if len(params) != count:
            raise UsageError(f"{len(params)} sampling_params for {count} prompts: give one for all, or one for each")
        for each in params:
            make_sampling(each, self._info, self._tokenizer, 1, 0)
        return list(params)

    def _encode_all(self, prompts: Sequence[Prompt | RowError], special: bool) -> list[Tokens | RowError]:
        """Tokens of every prompt; texts go to the tokenizer together."""
        texts = [each for each in map(_text, prompts) if each is not None]
        try:
            of_text = iter(self._tokenizer.encode_batch(texts, special))
        except RowError:  # one of them is not valid: each for itself, so that the others go on
            return [self._encode(each, special) for each in prompts]
        return [next(of_text) if _text(each) is not None else self._encode(each, special) for each in prompts]

    def _encode(self, prompt: Prompt | RowError, special: bool) -> Tokens | RowError:
        if isinstance(prompt, RowError):
            return prompt
        text = _text(prompt)
        try:
            return self._tokenizer.encode(text, special) if text is not None else _given_tokens(prompt)
        except RowError as error:
            return error

    def _task(
        self, prompt: Prompt | RowError, tokens: Tokens | RowError, params: SamplingParams, adapter: str = ""
    ) -> Task:
        number, self._count = self._count, self._count + 1
        error = str(tokens) if isinstance(tokens, RowError) else ""
        unknown = sorted(set(prompt) - _PROMPT_KEYS) if isinstance(prompt, Mapping) else []
        if unknown:
            error = f"a prompt has {', '.join(map(repr, unknown))}, which is not available here: leave it out"
        if adapter and adapter not in self.config.adapters:
            known = ", ".join(self.config.adapters) or "none"
            error = f"there is no adapter {adapter!r}; known are {known}: name it in LLM(adapters={{name: folder}})"
        return Task(
            request_id=str(number),
            text=_text(prompt),
            tokens=array(TOKEN) if isinstance(tokens, RowError) else tokens,
            params=params,
            seed=row_seed(self.config.seed, number) if params.seed is None else params.seed,
            salt=str(prompt.get("cache_salt") or "") if isinstance(prompt, Mapping) else "",
            adapter=adapter,
            error=error,
        )

    def _with_source(self, template: ChatTemplate, source: str | None) -> ChatTemplate:
        return template if source is None else ChatTemplate({"default": source}, template.variables)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # a single one
    return list(prompts)  # type: ignore[arg-type]  # several


def _text(prompt: Prompt | RowError) -> str | None:
    """The text of a prompt; None where it is token ids, or not a prompt at all."""
    found = prompt.get("prompt") if isinstance(prompt, Mapping) and "prompt_token_ids" not in prompt else prompt
    return found if isinstance(found, str) else None


def _given_tokens(prompt: Prompt) -> Tokens:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
    try:
        return array(TOKEN, ids)  # type: ignore[arg-type]  # whatever it is, array refuses what is not token ids
    except (TypeError, OverflowError) as error:
        raise RowError(f"a prompt must be a text or a list of token ids ({error})", param="prompt") from error


def _adapter_names(given: Adapters, count: int) -> list[str]:
    """The adapter of each prompt, '' for none."""
    each = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(each) != count:
        raise UsageError(f"{len(each)} in lora_request for {count} prompts: give one for all, or one for each")
    names = ["" if one is None else getattr(one, "lora_name", one) for one in each]
    for name in names:
        if not isinstance(name, str):
            raise UsageError(f"lora_request is {name!r}; it must be the name of one of LLM(adapters={{name: folder}})")
    return names


def _beginning(task: Task) -> tuple[str, bytes]:
    """A key that sorts prompts by adapter and tokens: bytes compare faster than numbers."""
    return task.adapter, np.frombuffer(task.tokens, dtype=np.int32).astype(">i4").tobytes() if task.tokens else b""


def _refuse(**values: object) -> None:
    for name, value in values.items():
        if value is not None:
            raise UsageError(f"{name} is not available in this engine; leave it out")
