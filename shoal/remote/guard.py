"""Between a job and a server that the job has started: ends the server when the job ends, however it ends.

It knows a command and a pipe; it must not know what the command does. The parent alone runs it, as
`python -m shoal.remote.guard DESCRIPTOR`, writes the command into the pipe, and holds that until the server is to end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

from shoal.core.parent import end_with_parent

GOODBYE = 5.0  # seconds that a server has to end by itself when it is told to,
REST = 1.0  # and what it has started when it has ended
LOOK = 0.02  # seconds between looks


def wait_for_group(group: int, seconds: float) -> None:
    """Until nobody of a process group is left, or for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(LOOK)


def kill_group(group: int) -> None:
    """End whoever is left of it."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is


def end_when_told(descriptor: int, server: subprocess.Popen[bytes]) -> None:
    """End the server when the pipe's other end is closed. First it is asked to: it has shared memory to give back."""
    os.read(descriptor, 1)
    server.terminate()
    wait_for_group(server.pid, GOODBYE)
    kill_group(server.pid)
    os._exit(0)


def main() -> None:
    """Run the command in a group of its own, and end as it does; 128 and the number of the signal that has ended it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # not ignored, for that is inherited: the pipe decides
    descriptor = int(sys.argv[1])
    with open(descriptor, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    if not line.endswith(b"\n"):
        return  # the parent has gone before it has said what to start
    words, environment = json.loads(line)
    server = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, process_group=0,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # should this process itself be killed
    )  # fmt: skip
    threading.Thread(target=end_when_told, args=(descriptor, server), daemon=True).start()
    code = server.wait()
    wait_for_group(server.pid, REST)
    kill_group(server.pid)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
