"""Lines of a batch file as token ids, and as requests to the engine. Knows the model's words, never its weights.

It must not know where prompts are kept, nor in which order rows run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import msgspec
import numpy as np

from shoal.core.config import BLOCK_SIZE
from shoal.core.errors import RowError
from shoal.core.types import TOKEN, Answer, Constraint, Request, Sampling, Tokens, root_of
from shoal.jobs.body import ChatBody, ClassifyBody, VectorBody
from shoal.jobs.embed import check_kind
from shoal.jobs.keys import RequestKeys
from shoal.jobs.schema import RowSpec, parse_line
from shoal.jobs.settings import JobSettings
from shoal.jobs.tools import shown_tools, turn_of, wanted_call
from shoal.jobs.vector_rows import PairTemplate, VectorRows
from shoal.text.checkpoint import ModelInfo
from shoal.text.constraint import Checker
from shoal.text.joint import Joint
from shoal.text.tools import Style

GREEDY_BELOW = 1e-5  # a temperature below this is greedy, as in vLLM

Staircase = tuple[tuple[int, int], ...]


class TokenizerLike(Protocol):
    """What is needed of a tokenizer."""

    @property
    def hash(self) -> str: ...

    @property
    def num_after(self) -> int: ...

    @property
    def joint(self) -> Joint | None: ...

    def encode(self, text: str, special: bool = True) -> Tokens: ...

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[Tokens]: ...


class TemplateLike(PairTemplate, Protocol):
    """What is needed of a chat template."""

    @property
    def hash(self) -> str: ...

    @property
    def style(self) -> Style | None: ...


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """A good row as the plan needs it."""

    prompts: list[Tokens]
    samples: int  # answers wanted of each prompt
    max_tokens: int  # of the shortest prompt's answers: the row's own limit, or the rest of the context
    expect: float | None  # tokens each answer will have, where the row fixes it
    root: str  # rows with different roots share nothing
    score_from: int  # as in Request
    key: int  # hash of its custom_id within this process; 0 for a plain row
    asks: list[bytes]  # a key for each prompt: equal keys have equal answers; empty where its place decides them
    vector: bool = False  # its last position's hidden state is needed, though nothing is sampled from it
    alone: bool = False  # its prompts take nothing from others


class RowEncoder:
    """Turns lines into tokens (once) and into requests (when they are fed). One thread may encode."""

    def __init__(
        self, tokenizer: TokenizerLike, template: TemplateLike | None, model: ModelInfo, settings: JobSettings
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.model = model
        self.settings = settings
        self._keys = RequestKeys()
        self._checker = Checker()
        self._vectors = VectorRows(model, template, tokenizer.joint, tokenizer.num_after)
        self.style = template.style if template is not None else None  # how the model writes calls of tools

    @property
    def fingerprint(self) -> str:
        """Another one whenever the same line could become other tokens, or be refused."""
        known = self.model
        vector = (known.vector, known.vector_context, known.no_vector, known.head, known.kinds)
        model = (known.context, known.vocab_size, *vector)
        files = (self.tokenizer.hash, self.template.hash if self.template else "")
        return hashlib.sha256(repr((files, model, self.settings)).encode()).hexdigest()

    @property
    def order(self) -> Literal["prefix", "length"]:
        """In which order rows are served best: nothing is shared in an encoder, and texts of one length go together."""
        return "length" if self.model.encoder else "prefix"

    def parse(self, raw: bytes | None) -> RowSpec:
        """The row of a line; raises RowError. None is a line that was too long to read."""
        return parse_line(raw, self.settings)

    def encode(self, raws: Sequence[bytes | None]) -> list[Encoded | RowError]:
        """One result for each line, in order. Nothing but a RowError comes of a bad line."""
        return self._finish(self._read(raws))

    def stream(self, batches: Iterable[Sequence[bytes | None]]) -> Iterator[list[Encoded | RowError]]:
        """`encode` of each batch in order; while one is tokenized, the next is read and rendered."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[list[Encoded | RowError]] | None = None
            for raws in batches:
                begun = pool.submit(self._finish, self._read(raws))
                if ahead is not None:
                    yield ahead.result()
                ahead = begun
            if ahead is not None:
                yield ahead.result()

    def requests(
        self,
        line: int,
        row: RowSpec,
        number: int,
        prompt: Tokens,
        index: int = -1,
        futures: Sequence[Staircase] | None = None,
    ) -> list[Request]:
        """The n requests of a row's prompt `number`, whose tokens are given; `line` is the row's in this input.

        `index` is that of the first, `futures` has one for each: as in Request. Prompt tokens are scored once, for
        the first. Raises RowError only for a row that `encode` refuses too.
        """
        if isinstance(row.body, VectorBody):
            future = futures[0] if futures is not None else None
            id, adapter = f"{line}.{number}.0", self.settings.adapter(row.body)
            nothing = Sampling(max_tokens=0)
            return [Request(id, prompt, nothing, Answer.VECTOR, adapter=adapter, index=index, future=future)]
        sampling = self._sampling(line, row, number, len(prompt))
        constraint = self._constraint(row)
        top, first = row.score_top, _computed_from(row.score_from)
        return [
            Request(
                id=f"{line}.{number}.{sample}",
                prompt=prompt,
                sampling=dataclasses.replace(sampling, sample=sample) if sample else sampling,
                constraint=constraint,
                score_from=first if sample == 0 else -1,
                score_top=max(top, 0),
                adapter=self.settings.adapter(row.body),
                salt=row.body.cache_salt or "",
                index=index + sample if index >= 0 else -1,
                future=futures[sample] if futures is not None else None,
            )
            for sample in range(row.n)
        ]

    def _read(self, raws: Sequence[bytes | None]) -> _Batch:
        """Parse and render: all that is Python's own work."""
        batch = _Batch([], ([], []), ([], []))
        for place, raw in enumerate(raws):
            try:
                row = self.parse(raw)
                texts, special = self._texts(row)
            except RowError as error:
                batch.rows.append(error)
                continue
            batch.rows.append(row)
            batch.texts[special].extend(texts)
            batch.places[special].extend([place] * len(texts))
        return batch

    def _texts(self, row: RowSpec) -> tuple[list[str], bool]:
        """The texts to tokenize, and whether the tokenizer adds its special tokens. Token-id prompts are not here."""
        body = row.body
        special = body.add_special_tokens
        if isinstance(body, VectorBody):
            return self._vectors.texts(row, self._render)
        check_kind(body, self.model)
        if isinstance(body, ChatBody):
            return [self._render(body)], bool(special)
        return [prompt for prompt in row.prompts if isinstance(prompt, str)], special is not False

    def _render(self, body: ChatBody | ClassifyBody) -> str:
        if self.template is None:
            raise RowError(
                "this model has no chat template: send the text to /v1/completions (or leave --chat out)",
                "no_chat_template",
                "messages",
            )
        final, turns = bool(body.continue_final_message), [turn_of(m) for m in body.messages or ()]
        extra = body.chat_template_kwargs or {}
        if not isinstance(body, ChatBody):  # the whole chat is judged: nobody is about to answer it
            return self.template.render(turns, bool(body.add_generation_prompt), final, None, extra)
        opening = not final if body.add_generation_prompt is None else body.add_generation_prompt
        if body.reasoning_effort is not None:
            extra = {"reasoning_effort": body.reasoning_effort, **extra}
        return self.template.render(turns, opening, final, shown_tools(body, self.style), extra)

    def _finish(self, batch: _Batch) -> list[Encoded | RowError]:
        """Tokenize and check: most of it is the tokenizer's work, outside Python's lock."""
        prompts: dict[int, list[Tokens]] = {}
        for special in (False, True):
            encoded = self._tokenize(batch.texts[special], special)
            for place, tokens in zip(batch.places[special], encoded, strict=True):
                prompts.setdefault(place, []).append(tokens)
        results: list[Encoded | RowError] = []
        for place, row in enumerate(batch.rows):
            if isinstance(row, RowError):
                results.append(row)
                continue
            try:
                results.append(self._encoded(row, prompts.pop(place, None)))
            except RowError as error:
                results.append(error)
        return results

    def _tokenize(self, texts: list[str], special: bool) -> list[Tokens]:
        return self.tokenizer.encode_batch(texts, special) if texts else []

    def _encoded(self, row: RowSpec, prompts: list[Tokens] | None) -> Encoded:
        body = row.body
        if prompts is None:
            prompts = [self._given_tokens(p) for p in row.prompts if not isinstance(p, str)]
        if isinstance(body, VectorBody):
            return self._to_vectors(row, body, prompts)
        limit = row.max_tokens
        cut = body.truncate_prompt_tokens
        if cut is not None:
            keep = cut if cut >= 0 else self.model.context - (limit or 1)
            prompts = [p[-keep:] if keep > 0 else p[:0] for p in prompts]
        room = self.model.context
        for prompt in prompts:
            room = min(room, self.model.context - len(prompt))
            self._check_length(len(prompt), limit, "messages" if isinstance(body, ChatBody) else "prompt")
            self._check_words(prompt, "messages" if isinstance(body, ChatBody) else "prompt")
            if row.score_from > max(1, len(prompt) - 1):
                raise RowError(
                    f"score_from {row.score_from} is not inside a prompt of {len(prompt)} tokens: lower it",
                    param="score_from",
                )
        self._check_ids(row)
        self._constraint(row)
        answer = room if limit is None else limit
        return Encoded(
            prompts=prompts,
            samples=row.n,
            max_tokens=answer,
            expect=float(answer) if body.ignore_eos and not body.stop and not body.stop_token_ids else None,
            root=root_of(self.settings.adapter(body), body.cache_salt or ""),
            score_from=_computed_from(row.score_from),
            key=0 if row.custom_id is None else hash(row.custom_id) or 1,
            asks=self._keys.of(self, row, prompts, self.model.context),
        )

    def _to_vectors(self, row: RowSpec, body: VectorBody, tokens: list[Tokens]) -> Encoded:
        """A row whose prompts become vectors; a prompt may be made of several texts."""
        for each in tokens:
            self._check_words(each, "input")
        prompts = self._vectors.prompts(row, tokens)
        for prompt in prompts:
            self._check_length(len(prompt), 0, "input")
        key = 0 if row.custom_id is None else hash(row.custom_id) or 1
        asks = self._keys.of(self, row, prompts, self.model.context)
        root = root_of(self.settings.adapter(body), "")
        return Encoded(prompts, 1, 0, 0.0, root, -1, key, asks, vector=True, alone=self.model.encoder)

    def _constraint(self, row: RowSpec) -> Constraint | None:
        """The row's constraint, the same object for rows that have the same; RowError if it cannot be kept."""
        asked = row.constraint or wanted_call(row.body, self.style)
        if asked is None:
            return None
        constraint, field = asked
        try:
            return self._checker.check(constraint)
        except RowError as error:
            raise RowError(f"{field}: {error}", error.code, field) from None

    def _given_tokens(self, ids: list[int]) -> Tokens:
        if ids and not (0 <= min(ids) and max(ids) < self.model.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.model.vocab_size)
            raise _not_a_token(wrong, self.model.vocab_size, "prompt")
        return array(TOKEN, ids)

    def _check_words(self, prompt: Tokens, param: str) -> None:
        """A tokenizer may have words that the embedding has no row for, and a text may hold one."""
        most = int(np.frombuffer(prompt, dtype=np.int32).max(initial=0))
        if most >= self.model.vocab_size:
            raise _not_a_token(most, self.model.vocab_size, param)

    def _check_length(self, length: int, limit: int | None, param: str) -> None:
        context = self.model.context
        if length == 0:
            raise RowError("the prompt is empty: it needs at least one token", "empty_prompt", param)
        if length + (1 if limit is None else limit) > context:
            wanted = "at least 1 for the answer" if limit is None else f"max_tokens {limit}"
            raise RowError(
                f"the model's context is {context} tokens, and the prompt's {length} and {wanted} make more:"
                " shorten the prompt or lower max_tokens",
                "context_length_exceeded",
                param,
            )

    def _check_ids(self, row: RowSpec) -> None:
        body = row.body
        vocab_size = self.model.vocab_size
        for name, ids in (
            ("logit_bias", body.logit_bias),
            ("stop_token_ids", body.stop_token_ids),
            ("allowed_token_ids", body.allowed_token_ids),
        ):
            for token in ids or ():
                if not 0 <= token < vocab_size:
                    raise _not_a_token(token, vocab_size, name)

    def _sampling(self, line: int, row: RowSpec, number: int, length: int) -> Sampling:
        body = row.body
        model = self.model
        room = model.context - length
        stop = frozenset(body.stop_token_ids or ())
        temperature = _first(body.temperature, model.sampling.get("temperature"), 1.0)
        greedy = temperature < GREEDY_BELOW
        return Sampling(
            max_tokens=room if row.max_tokens is None else min(row.max_tokens, room),
            min_tokens=body.min_tokens or 0,
            stop=stop if body.ignore_eos else stop | model.eos,
            temperature=0.0 if greedy else temperature,
            top_k=0 if greedy else max(0, int(_first(body.top_k, model.sampling.get("top_k"), 0))),
            top_p=1.0 if greedy else _first(body.top_p, model.sampling.get("top_p"), 1.0),
            min_p=0.0 if greedy else _first(body.min_p, model.sampling.get("min_p"), 0.0),
            repetition_penalty=_first(body.repetition_penalty, model.sampling.get("repetition_penalty"), 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=tuple(sorted((body.logit_bias or {}).items())),
            allowed=tuple(sorted(set(body.allowed_token_ids or ()))),
            banned=self._banned(body.bad_words or ()),
            seed=self.seed(line, row, number),
            logprobs=row.logprobs,
        )

    def seed(self, line: int, row: RowSpec, number: int) -> int:
        """The seed of a row's prompt. Where the row gives none, its custom_id decides, and its line if it has none."""
        if row.body.seed is not None:
            return row.body.seed
        name = row.line or line if row.custom_id is None else row.custom_id
        text = f"{self.settings.seed}\0{number}\0{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of words, at the start of a text and, where the tokenizer tells them apart, inside it."""
        banned: list[tuple[int, ...]] = []
        for word in words:
            bare = tuple(self.tokenizer.encode(word.lstrip(), False))
            spaced = tuple(self.tokenizer.encode(" " + word.lstrip(), False))
            banned.append(bare)
            if bare and spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                banned.append(spaced)
        return tuple(sequence for sequence in banned if sequence and max(sequence) < self.model.vocab_size)


class _Batch(msgspec.Struct):
    rows: list[RowSpec | RowError]
    texts: tuple[list[str], list[str]]  # to be tokenized without [0] and with [1] special tokens
    places: tuple[list[int], list[int]]  # the row of each text


def _computed_from(score_from: int) -> int:
    """The first position whose score is computed: where a block begins, for less than a block is never shared. The
    scores before the one that the row asks for are left out of its answer."""
    return 1 + (score_from - 1) // BLOCK_SIZE * BLOCK_SIZE if score_from >= 1 else -1


def _first(own: float | None, default: float | None, neutral: float) -> float:
    return own if own is not None else default if default is not None else neutral


def _not_a_token(token: int, vocab_size: int, param: str) -> RowError:
    return RowError(
        f"token id {token} is not in the vocabulary (0 to {vocab_size - 1}): correct {param}", "invalid_token", param
    )
