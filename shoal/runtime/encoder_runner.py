"""The executor over an encoder: whole texts in, a vector each, in one thread of its own. It has no blocks.

It knows tickets and what an encoder makes of token ids; it must not know why a step holds the texts that it holds.
"""

from __future__ import annotations

import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from shoal.core.types import Answer, Request, Slice, Step, StepResult
from shoal.runtime.runner import StepInFlight


class TextEncoder(Protocol):
    """What the runner needs of an encoder."""

    def forward(self, ids_T: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Return float32 [N, D] for texts that follow each other in T."""
        ...


class EncoderRunner:
    """Runs steps of one encoder. `submit` may be called from any one thread; all tensors are touched by the worker."""

    def __init__(self, model: TextEncoder, device: torch.device, vocab_size: int) -> None:
        self._model, self._device, self._vocab_size = model, device, vocab_size
        self._requests: dict[int, Request] = {}  # by ticket
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-kernels")

    def submit(self, step: Step) -> StepInFlight:
        """Run the step after all earlier ones."""
        return StepInFlight(self._worker.submit(self._run, step))

    def close(self) -> None:
        """Wait for the steps in flight and end the worker. No step may follow."""
        self._worker.shutdown()

    # -- all below runs in the worker ------------------------------------------------------------------

    def _run(self, step: Step) -> StepResult:
        began = time.perf_counter()
        result = StepResult({})
        for ticket in step.drops:
            self._requests.pop(ticket, None)
        for start in step.starts:
            self._requests[start.ticket] = start.request
        good = []
        for part in step.slices:
            problem = self._problem(part)
            if problem:
                result.errors[part.ticket] = problem
            else:
                good.append(part)
        if good:
            self._encode(sorted(good, key=lambda part: len(part.tokens)), result)
        result.seconds = time.perf_counter() - began
        return result

    def _problem(self, part: Slice) -> str:
        """Why a text cannot be encoded, or ''."""
        request, ids = self._requests[part.ticket], np.frombuffer(part.tokens, dtype=np.int32)
        if request.answer is not Answer.VECTOR:
            return "this model makes vectors, and no text: send the row to /v1/embeddings, or take another model"
        if request.adapter:
            return f"no adapter {request.adapter!r} is loaded: an encoder has none"
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            return f"the text has a token outside the model's vocabulary of {self._vocab_size} tokens"
        assert part.start == 0 and len(ids) == len(request.prompt), "a policy has cut a text that must stay whole"
        return ""

    def _encode(self, parts: list[Slice], result: StepResult) -> None:
        ids_T = np.frombuffer(b"".join([memoryview(part.tokens) for part in parts]), dtype=np.int32).astype(np.int64)
        with torch.inference_mode():
            ids = torch.from_numpy(ids_T).to(self._device)
            vectors_ND = self._model.forward(ids, [len(part.tokens) for part in parts]).cpu().numpy()
        finite_N = np.isfinite(vectors_ND).all(axis=1).tolist()
        for part, finite, vector_D in zip(parts, finite_N, vectors_ND, strict=True):
            if finite:
                result.vectors[part.ticket] = array("f", vector_D.tobytes())
            else:
                result.errors[part.ticket] = "the model's vector is not finite: check the checkpoint"
