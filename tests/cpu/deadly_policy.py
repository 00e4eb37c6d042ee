"""A policy that ends its process as soon as a certain row runs. A test fixture."""

from __future__ import annotations

import os

from shoal.core.sequence import Sequence
from shoal.sched.policies.batch import BatchPolicy
from shoal.sched.policy import Key, View
from shoal.text.checkpoint import resolve_model
from shoal.text.tokenizer import Tokenizer

WORD = "kill"


class Deadly(BatchPolicy):
    """Ends the process when a prompt with WORD in it has begun to run."""

    def rank(self, seq: Sequence, view: View) -> Key:
        if seq.ticket >= 0 and WORD in Tokenizer.load(resolve_model()).decode(seq.request.prompt):
            os._exit(9)
        return super().rank(seq, view)
