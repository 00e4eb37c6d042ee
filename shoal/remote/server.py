"""One server: its address, how many calls it has and may have, and when it may be asked again.

It must not know calls, nor make any; times are the caller's, in seconds.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from shoal.core.errors import UsageError
from shoal.remote.limit import MOST, Limit

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 30.0  # seconds after a refusal that does not say for how long


def parse_url(text: str) -> str:
    """The address before `/chat/completions`, as OpenAI's clients take it; of a bare host its /v1. UsageError."""
    try:
        parts = urlsplit(text.strip())
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port beyond 65535, or half of a bracket
        whole = False
    if not whole or any(sign.isspace() or not sign.isprintable() for sign in text.strip()):
        shown = text.rpartition("@")[2]  # what stands before it may be a password
        raise UsageError(f"--endpoint {shown!r} is no address: write http://localhost:8000/v1, several with commas")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"--endpoint {parts.hostname}: an address may hold no key or query; OPENAI_API_KEY has the key"
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


class Server:
    """Changed by the thread that makes calls alone."""

    def __init__(self, url: str, most: float = MOST) -> None:
        self.url = url  # from `parse_url`
        self.limit = Limit(most=most)
        self.running = 0  # calls under way
        self.answers = 0  # calls that it has answered
        self.vain_since: float | None = None  # since when every call was refused, or did not reach it
        self.failed = set[str]()  # calls that have not reached it since it last answered one
        self.doubted = set[str]()  # calls that were told that the address, or the key, is wrong
        self.trouble = ""  # why the last call was in vain
        self.told = False  # that it asks for a long pause
        self._until = 0.0  # not asked before
        self._pause = FIRST_PAUSE

    @property
    def useful(self) -> bool:
        """Whether it has answered a call."""
        return self.answers > 0

    def place(self, url: str) -> str:
        """Where a call of this url of a row goes."""
        return self.url + url.removeprefix("/v1")

    def wait(self, now: float) -> float:
        """Seconds until it may be asked; 0 for now."""
        return max(0.0, self._until - now)

    def open(self, now: float) -> bool:
        """Whether it takes another call now."""
        return self._until <= now and self.limit.room(self.running)

    def pause(self, now: float, seconds: float | None) -> None:
        """Ask nothing for so long: as it says, and at least for longer each time."""
        fresh = self._until <= now  # else several calls have found out the same at once
        own = self._pause if fresh else 0.0
        if fresh and (seconds is None or seconds < own):
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        until = max(self._until, now + max(seconds or 0.0, own))
        if self.vain_since is not None:  # a wait that was asked for is no silence
            self.vain_since += max(0.0, until - max(self._until, now + own))
        self._until = until

    def in_vain(self, now: float, seconds: float | None, why: str) -> None:
        """A call was refused, or could not be made."""
        self.vain_since = now if self.vain_since is None else self.vain_since
        self.trouble = why
        before, fresh = self._pause, self._until <= now
        self.pause(now, seconds)
        if fresh:  # also where it asks for more: who asks for a second each time is not to be asked for ever
            self._pause = min(2 * before, LONGEST_PAUSE)

    def awake(self) -> None:
        """It may be asked at once: it is there again."""
        self._until, self._pause = 0.0, FIRST_PAUSE

    def shut(self) -> None:
        """It is asked nothing any more."""
        self._until = float("inf")

    def reached(self) -> None:
        """It has said something about a call."""
        self.vain_since = None

    def answered(self) -> None:
        """It has answered a call."""
        self.answers += 1
        self.failed.clear()
        self.told = False
        self._pause = FIRST_PAUSE
