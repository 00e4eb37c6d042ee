"""When an engine that says nothing has been silent for too long, in words.

It knows times and how long earlier steps took; it must not know what the engine does, nor end it: it may only be slow.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.jobs.units import duration, percent

LEAST = 60.0  # seconds of silence that are never worth a word
TIMES = 10  # the longest silence so far that one may last before it is
IDLE = 0.02  # share of a core below which a process does not compute


class Patience:
    """An engine speaks after each step that takes long, so its silence is as long as the present step at most."""

    def __init__(self, processor_seconds: Callable[[], float]) -> None:
        """`processor_seconds` says how many the engine has used."""
        self._spent = processor_seconds
        self._since = 0.0  # when it last spoke, or began
        self._longest = 0.0  # silence that ended
        self._limit = LEAST
        self._looked: tuple[float, float] | None = None  # in this silence: when, and processor seconds until then

    def begin(self, now: float) -> None:
        """There is an engine with work, perhaps another than before."""
        self._since, self._looked = now, None
        self._limit = max(LEAST, TIMES * self._longest)

    def heard(self, now: float) -> None:
        """It has spoken."""
        self._longest = max(self._longest, now - self._since)
        self.begin(now)

    def words(self, now: float, process: int) -> str:
        """What to say of the silence of `process`; "" nearly always. Said again when it has lasted twice as long.

        To end it is left to those who know more.
        """
        silent = now - self._since
        if self._looked is None and silent > self._limit / 2:
            self._looked = now, self._spent()
        if silent <= self._limit or self._looked is None:
            return ""
        self._limit = 2 * silent
        when, before = self._looked
        passed = now - when
        share = (self._spent() - before) / passed if passed > 0 else 0.0
        known = f"the longest so far took {duration(self._longest)}" if self._longest else "none has ended so far"
        how = (
            f"it computes ({percent(share, 1)} of a core), so it may be slow hardware or a large step"
            if share > IDLE
            else "it uses no processor time: it is stopped, stuck, or waits for memory from disk"
        )
        return (
            f"the engine's present step has run for {duration(silent)}, and {known}; {how}; wait, or end process "
            f"{process}: its unfinished rows then run again in another engine"
        )
