"""What the thread that makes calls tells the one that asks for them. It must not know servers, nor why calls end."""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass, field

from shoal.core.types import Output


@dataclass(frozen=True, slots=True)
class Waits:
    """This call is under way no more, and will be again."""

    id: str


@dataclass(frozen=True, slots=True)
class Blamed:
    """This call has failed while others were answered."""

    id: str


@dataclass(frozen=True, slots=True)
class Said:
    """What the user is to know."""

    words: str


@dataclass(slots=True)
class Happened:
    """Since it was last looked."""

    outputs: list[Output] = field(default_factory=list)
    started: dict[str, None] = field(default_factory=dict)  # calls, and not waiting again since
    again: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.outputs or self.started or self.again or self.blamed or self.warnings)


class Inbox:
    """Ends of calls, ids of those that start, what else is to be known, and why there will be no more."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Output | str | Waits | Blamed | Said | BaseException] = queue.SimpleQueue()

    def put(self, item: Output | str | Waits | Blamed | Said | BaseException) -> None:
        """By either thread."""
        self._queue.put(item)

    def take(self, timeout: float) -> Happened:
        """What has happened; when nothing has, what does first within `timeout` seconds. Raises what ends it all."""
        end, found = time.monotonic() + timeout, Happened()
        with contextlib.suppress(queue.Empty):
            while True:
                left = 0.0 if found else max(end - time.monotonic(), 0.0)
                item = self._queue.get(timeout=left) if left else self._queue.get_nowait()
                match item:
                    case BaseException() if found:
                        self._queue.put(item)  # what has come before it counts
                        break
                    case BaseException():
                        raise item
                    case str():
                        found.started[item] = None
                    case Waits():
                        found.started.pop(item.id, None)
                        found.again.append(item.id)
                    case Blamed():
                        found.blamed.append(item.id)
                    case Said():
                        found.warnings.append(item.words)
                    case _:
                        found.outputs.append(item)
        return found
