"""One process of a crew: makes an encoder, then answers batch after batch until its parent hangs up.

It knows the two messages of `jobs/crew`; it must not know files of input, plans or other processes.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from shoal.jobs.crew import Recipe
from shoal.jobs.encode import RowEncoder
from shoal.text.chat import ChatTemplate
from shoal.text.tokenizer import Tokenizer


def main() -> None:
    """Run as `python -m shoal.jobs.crew_host DESCRIPTOR`, by the parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole group; the parent decides what it means
    connection = Connection(int(sys.argv[1]))
    try:
        recipe = connection.recv()
        assert isinstance(recipe, Recipe), recipe
        tokenizer = Tokenizer.load(recipe.folder)
        encoder = RowEncoder(tokenizer, ChatTemplate.load(recipe.folder), recipe.model, recipe.settings)
        while True:
            connection.send(encoder.encode(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has what it wanted, or is gone


if __name__ == "__main__":
    main()
