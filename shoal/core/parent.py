"""What a process asks of the system about its parent. It must not know which processes there are, nor what they do."""

from __future__ import annotations

import ctypes
import signal
import sys

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent ends, even while a library that is being loaded holds the
    interpreter. Elsewhere nothing happens: a pipe to the parent has to tell, a little later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, number)
