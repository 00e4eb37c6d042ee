"""What a job says once for all its rows. It must not know where the words came from (flags, environment, file)."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.jobs.prompt import PromptTemplate


@dataclass(frozen=True, slots=True)
class JobSettings:
    """Defaults for rows that are silent, and what the rows of a file are. None leaves the choice to the model.

    A row's own field wins over these; these win over the model's generation_config.json.
    """

    model: str = "shoal"  # the name in answers to rows that name none
    served: tuple[str, ...] = ()  # with `strict`: the only names a row may give; empty means `model` alone
    strict: bool = False  # whether a row's model name must be one of `served`
    seed: int = 0  # with a row's custom_id (or line) it makes the seed of rows without one
    prompt: PromptTemplate | None = None  # plain rows: how a row's columns become its prompt
    chat: bool = False  # plain rows: the prompt is a user's message
    max_tokens: int | None = None  # None: the rest of the context
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()  # of plain rows, and of rows without stop strings
    ignore_eos: bool = False

    @property
    def plain(self) -> bool:
        """Whether lines are rows of columns; otherwise they are requests in the OpenAI Batch shape."""
        return self.prompt is not None or self.chat

    @property
    def names(self) -> tuple[str, ...]:
        """The model names that a strict job serves."""
        return self.served or (self.model,)
