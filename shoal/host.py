"""The engine process: build what is asked for, step while there is work, end when the parent does.

It knows the pipe and the engine; it must not know what requests are for, nor touch any file but the model's.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from shoal.client import NEWS_EVERY, Begin, Cancel, Failed, InProcess, News, Ready, Submit, connection_of
from shoal.core.errors import ShoalError
from shoal.core.parent import end_with_parent

ORPHANED = 70  # exit code when the parent is gone


def listen(connection: Connection, inbox: queue.SimpleQueue[object]) -> None:
    """Pass messages on; when the parent is gone, end at once, in the middle of a step if need be."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(ORPHANED)


def take(backend: InProcess, message: object) -> None:
    """Do what a message says."""
    match message:
        case Submit():
            backend.submit(message.requests, message.watched)
        case Cancel():
            backend.cancel(message.ids)
        case _:
            raise TypeError(f"an engine does not know the message {message!r}")


def merge(old: News | None, new: News) -> News:
    """Two News as one."""
    if old is None:
        return new
    outputs, started, steps = old.outputs + new.outputs, old.started + new.started, old.steps + new.steps
    return News(outputs, started, steps, new.waiting, new.running, new.used_blocks, new.counters)


def settle_interpreter() -> None:
    """Let the kernels' thread have the interpreter soon when it asks, and let the garbage collector pass over what is
    here for good, and look at the rest more seldom.

    Between two kernels that thread needs the interpreter for microseconds, while this one plans for a millisecond or
    two: by default it would be asked to let go after five.

    Beside 256 running sequences a full collection takes 7 to 15 ms, in the middle of a step's plan, and finds nothing:
    what steps leave behind is freed by its counts. With this the 99th percentile of plan and commit is 2.4 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    sys.setswitchinterval(10e-6)


def serve(backend: InProcess, connection: Connection, inbox: queue.SimpleQueue[object]) -> None:
    """Step for ever. News goes out when a request has news or started, and a few times a second."""
    unsent: News | None = None
    sent = 0.0
    while True:
        idle = not backend.engine.busy
        while idle or not inbox.empty():
            take(backend, inbox.get())
            idle = False
        news = backend.outputs()
        if news is not None:
            unsent = merge(unsent, news)
        now = time.monotonic()
        if unsent is not None and (
            unsent.outputs or unsent.started or now - sent > NEWS_EVERY or not backend.engine.busy
        ):
            connection.send(unsent)
            unsent, sent = None, now
        wait = backend.engine.wait_until
        if wait is not None:
            time.sleep(min(max(wait - now, 0.0), 0.01))


def build_and_serve(connection: Connection, inbox: queue.SimpleQueue[object]) -> None:
    """Build what the first message asks for and step for ever; return when it cannot be built."""
    from shoal.build import build_engine  # loads torch, while the parent still plans

    begin = inbox.get()
    assert isinstance(begin, Begin), begin
    try:
        built = build_engine(begin.config, begin.useful_tokens, share=begin.share, kv_bytes=begin.kv_bytes)
    except ShoalError as error:
        connection.send(Failed(str(error), error.exit_code))
        return
    settle_interpreter()
    facts = built.facts
    connection.send(
        Ready(
            device=facts.device, weights=facts.weights, kernels=facts.kernels, threads=facts.threads,
            num_blocks=facts.memory.num_blocks, block_size=facts.block_size, kv_bytes=facts.memory.total,
            context=facts.context, load_seconds=facts.load_seconds,
        )
    )  # fmt: skip
    serve(InProcess(built.engine), connection, inbox)


def main() -> None:
    """Run as `python -m shoal.host DESCRIPTOR [CORE …]`, by the parent alone."""
    end_with_parent()  # `listen` does it elsewhere, and a little later
    if len(sys.argv) > 2 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, sys.argv[2:]))  # before any thread begins: they all keep to these cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole group; the parent decides what it means
    connection = connection_of(int(sys.argv[1]))
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, inbox), daemon=True).start()  # first: loading takes seconds
    try:
        build_and_serve(connection, inbox)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(ORPHANED)  # the parent has all it wanted, or is gone


if __name__ == "__main__":
    main()
