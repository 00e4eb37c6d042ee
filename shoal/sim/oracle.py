"""An estimator that knows: for upper bounds, and for nothing else.

It lives with the simulator, which alone knows true lengths; no policy can reach one unless an experiment hands it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from shoal.core.sequence import Sequence
from shoal.sched.lengths import LengthEstimator, Lengths


class Oracle(LengthEstimator):
    """True lengths by request id; whoever is not among them runs to its limit."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = lengths

    def quantile(self, seq: Sequence, share: float) -> int:
        """The truth, whatever the share."""
        most = seq.request.sampling.max_tokens
        return min(most, self.lengths.get(seq.request.id, most))

    def draw(self, seqs: Seq[Sequence], count: int, luck: np.random.Generator) -> Lengths:
        """The truth, `count` times."""
        return np.tile([float(self.quantile(seq, 0.5)) for seq in seqs], (count, 1))
