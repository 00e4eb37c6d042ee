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
    parts = urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--endpoint {text!r} is no address: write http://localhost:8000/v1, several with commas")
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
        self.silent_since: float | None = None  # when it could not be reached, since it last was
        self.useful = False  # it has answered a call
        self.trouble = ""  # why it could not be reached
        self._until = 0.0  # not asked before
        self._pause = FIRST_PAUSE

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
        """Ask nothing for so long: as it says, or for longer each time."""
        if seconds is None:
            if self._until > now:
                return  # several calls have found out the same at once
            seconds, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._until = max(self._until, now + seconds)

    def unreached(self, now: float) -> None:
        """It could not be connected to."""
        if self._until > now:
            return
        self.silent_since = now if self.silent_since is None else self.silent_since
        self.pause(now, None)

    def reached(self) -> None:
        """It has said something."""
        self.silent_since = None

    def answered(self) -> None:
        """It has answered a call."""
        self.useful = True
        self._pause = FIRST_PAUSE
