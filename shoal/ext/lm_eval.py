"""Shoal as a model of lm-evaluation-harness: each kind of request becomes one batch job, choices share their context.

It knows the harness's model interface and the batch file; it must not know how rows are computed.

    python -m shoal.ext.lm_eval run --model shoal --model_args pretrained=FOLDER --tasks …

is the harness's own command with this model added; `import shoal.ext.lm_eval` adds it to a program that calls the
harness itself. Needs the package lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from shoal.call import run
from shoal.core.config import parse_bytes
from shoal.core.errors import ShoalError
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import ModelInfo, resolve_model
from shoal.text.tokenizer import Tokenizer

MOST_STOPS = 16  # stop strings that a row may have
ANSWER_TOKENS = 256  # of a generated answer, where the task does not say


@register_model("shoal")
class ShoalLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A checkpoint's answers and likelihoods, by batch jobs."""

    def __init__(
        self,
        pretrained: str = "",
        batch_size: object = None,  # the harness always gives these two: as many rows as memory holds run together
        max_batch_size: object = None,
        device: str | None = None,
        max_length: int | None = None,
        folder: str | None = None,
        memory: str | int | None = None,
        **options: Any,
    ) -> None:
        """`pretrained` is a folder or hub id, '' the embedded model; `options` are those of `shoal.run`: weights,
        cache, threads, … With `folder` the jobs stay there, and an evaluation that was stopped goes on."""
        super().__init__()
        self._folder = Path(folder) if folder else None
        self._model = str(pretrained)
        self._options = {"device": device or "cpu", **options}
        if memory is not None:
            self._options["memory"] = parse_bytes(str(memory))
        if "cache" in options:
            self._options["cache"] = Path(options["cache"])
        where = resolve_model(self._model)
        self._tokenizer = Tokenizer.load(where)
        self._template = ChatTemplate.load(where)
        self._info = ModelInfo.load(where, self._tokenizer)
        self._max_length = max_length

    # -- what the harness asks of every model ----------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        named = self._tokenizer.named.get("eos_token")
        return self._tokenizer.backend.token_to_id(named) if named else min(self._tokenizer.eos)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos is None else self._tokenizer.bos

    @property
    def max_length(self) -> int:
        """Tokens of an input. The token that it is asked about stands in the row too, so there is one fewer."""
        return self._max_length or self._info.context - 1

    @property
    def max_gen_toks(self) -> int:
        return ANSWER_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return (self._model or "embedded").replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the begin token already
            add_special_tokens = not string.startswith(self._tokenizer.decode([self.prefix_token_id], False))
        return list(self._tokenizer.encode(string, add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._template.render(chat_history, add_generation_prompt, not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        name = "default" if chat_template is True else chat_template
        return self._template.sources.get(name) if name else None

    # -- likelihoods -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: its log-probability, and whether every token of it is the best."""
        asked: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # continuations by context, each once
        pairs = []
        for _, context, continuation in requests:
            begin = len(context) + len(continuation) - (self.max_length + 1)  # as the harness cuts what is too long
            pair = tuple(context[max(begin, 0) :]), tuple(continuation)
            asked.setdefault(pair[0], {})[pair[1]] = None
            pairs.append(pair)
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        rows = (_scored(context, continuations) for context, continuations in asked.items())
        for (context, continuations), body in zip(asked.items(), self._answers("likelihoods", rows), strict=True):
            for continuation, choice in zip(continuations, body["choices"], strict=True):
                found[context, continuation] = _read(choice["logprobs"], len(context))
        for (text, _, _), pair in zip(requests, pairs, strict=True):
            if text is not None:  # None: a part of a longer text
                self.cache_hook.add_partial("loglikelihood", text, found[pair])
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the longest context, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            mine = [(None, *utils.make_disjoint_window(part)) for part in parts]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- answers -----------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of its stop strings."""
        wishes = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        rows = (self._generated(request.args[0], wish) for request, wish in zip(requests, wishes, strict=True))
        texts = []
        for request, wish, body in zip(requests, wishes, self._answers("answers", rows), strict=True):
            text = body["choices"][0]["text"]
            for stop in filter(None, wish["until"]):
                text = text.split(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generated(self, prompt: str, wish: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in wish.items() if k not in ("until", "max_gen_toks", "do_sample")}
        room = self.max_length - wish["max_gen_toks"]
        if room < 1:
            raise ShoalError(
                f"answers of {wish['max_gen_toks']} tokens leave no room in {self.max_length}: ask for fewer"
            )
        stops = [stop for stop in wish["until"] if stop][:MOST_STOPS]  # of others the text is cut off afterwards
        return {**rest, "prompt": self.tok_encode(prompt)[-room:], "max_tokens": wish["max_gen_toks"], "stop": stops}

    # -- jobs --------------------------------------------------------------------------------------------

    def _answers(self, kind: str, bodies: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers to these completions, in their order. A row that fails is an error: no score is true without."""
        lines = [
            json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for number, body in enumerate(bodies)
        ]
        name = f"{kind}-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}"
        with tempfile.TemporaryDirectory() as temporary:
            folder = self._folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            asked, output = folder / f"{name}.in.jsonl", folder / f"{name}.jsonl"
            if not asked.exists() or asked.read_text() != "".join(lines):
                asked.write_text("".join(lines))
            report = run(asked, output, model=self._model, **self._options)
            if report.exit_code:
                code, first = next(iter(report.errors.items()), ("", None))
                why = f"line {first.line} of {asked}: {code}: {first.message}" if first else "it was interrupted"
                raise ShoalError(
                    f"{report.rows.total - report.rows.ok} of {report.rows.total} rows have no answer ({why})"
                )
            with output.open() as file:
                for line in file:
                    yield json.loads(line)["response"]["body"]


def _scored(context: tuple[int, ...], continuations: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    """A row that scores continuations of one context, which is computed once."""
    return {
        "prompt": [[*context, *continuation] for continuation in continuations],
        "echo": True, "max_tokens": 0, "logprobs": 1, "score_from": len(context), "temperature": 0,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip


def _read(logprobs: dict[str, Any], begin: int) -> tuple[float, bool]:
    values = logprobs["token_logprobs"][begin:]
    tops = logprobs["top_logprobs"][begin:]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
