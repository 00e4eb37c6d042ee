"""What was said of a job before its first step, and the words between a job and whoever says it.

It knows numbers and how to set them beside what came of them; it must not know how anything is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from shoal.core.errors import ShoalError
from shoal.jobs.units import count, duration, size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shoal.jobs.plan import Plan
    from shoal.jobs.prepare import Prepared

_T = TypeVar("_T")

Tail = Literal["fit", "least", "most"]  # what answers do that have run for longer than any that have ended

SOON = 0.05  # share of the rows after whose end the time is said again, and kept


@dataclass(frozen=True, slots=True)
class Foretold:
    """What a job will come to. Where answers may end anywhere, from their ending at once to their limits."""

    prompt_tokens: int | None = None  # to be computed; None: nobody can say
    output_tokens: tuple[int, int] | None = None  # computed: least and most
    seconds: tuple[float, float] | None = None  # all in all: least and most; None: nobody can say
    kv_bytes: tuple[int, int] | None = None  # of keys and values in use at once, at most: least and most
    measured_at: float = 0.0  # Unix time of the measurement of this machine that the seconds rest on
    why: str = ""  # there are no seconds, or none were said anew while it ran
    soon: float | None = None  # seconds all in all, as estimated when a twentieth of the rows had ended
    soon_span: tuple[float, float] | None = None  # the same, least and most

    @property
    def lacking(self) -> str:
        """What `why` is the reason of."""
        return "time is not predicted" if self.seconds is None else "time left is not estimated anew"


def attempt(ask: Callable[[], _T]) -> _T | str:
    """What is said, or why nothing is. The job goes on either way: what is foretold decides nothing."""
    try:
        return ask()
    except Exception as error:  # arithmetic over whatever a file holds: a mistake in it must not cost any answers
        return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"


class Course(Protocol):
    """A job on its way: what is left, by what was foretold and what has come of it."""

    said: Foretold

    def ended(self, row: int, tokens: int) -> None:
        """A row of the plan has ended, with so many tokens of output."""
        ...

    def left(
        self, seconds: float, tokens: int, output: int, running: Sequence[float], tail: Tail = "fit"
    ) -> float | None:  # fmt: skip
        """Seconds until the last row ends, when `tokens`, of them `output` of answers, were computed in the `seconds`
        since the engine began; `running`: the seconds that each request has run which runs now; `tail`: how long those
        take that have run longest. None when nobody can say."""
        ...


class Seer(Protocol):
    """Whoever foretells jobs."""

    def free(self) -> int:
        """Bytes that an engine could take now: to be asked before one takes them."""
        ...

    def foretell(
        self, job: Prepared, plan: Plan, wanted: npt.NDArray[np.bool_] | None, planned: float, free: int
    ) -> Course | None:  # fmt: skip
        """The course of the `wanted` rows of a plan, or of all, `planned` seconds after the job began, by an engine
        that found so many bytes free."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """One number beside what it came to."""

    name: str
    low: float | None  # predicted; None: not predicted
    high: float | None
    actual: float
    unit: Literal["tokens", "seconds", "bytes"]

    def words(self) -> tuple[str, str]:
        """Predicted and actual, for a person."""
        if self.low is None or self.high is None:
            return "–", self._show(self.actual)
        low, high = self._show(self.low), self._show(self.high)
        return low if low == high else f"{low} to {high}", self._show(self.actual)

    def _show(self, number: float) -> str:
        return duration(number) if self.unit == "seconds" else (size if self.unit == "bytes" else count)(round(number))


def compare(said: Foretold, prompt_tokens: int, output_tokens: int, seconds: float, kv_bytes: int) -> list[Compared]:
    """The table of what was predicted and what it has come to."""
    low, high = said.seconds or (None, None)
    few, many = said.output_tokens or (None, None)
    some, full = said.kv_bytes or (None, None)
    found = [
        Compared("prompt tokens computed", said.prompt_tokens, said.prompt_tokens, prompt_tokens, "tokens"),
        Compared("output tokens", few, many, output_tokens, "tokens"),
        Compared("time", low, high, seconds, "seconds"),
        Compared("peak of keys and values", some, full, kv_bytes, "bytes"),
    ]
    if said.soon is not None:
        least, most = said.soon_span or (said.soon, said.soon)
        found.insert(3, Compared("time, when 5% of the rows had ended", said.soon, said.soon, seconds, "seconds"))
        if least < most:
            found.insert(4, Compared("… and its least and most", least, most, seconds, "seconds"))
    return found
