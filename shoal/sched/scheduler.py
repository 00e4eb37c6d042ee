"""plan, then commit. The mechanism: queues, budget, blocks, progress.

What to prefer is the policy's business; it must not know tensors, the wall clock, or how long an answer will be.
"""

from __future__ import annotations

import heapq
import math
from array import array
from dataclasses import dataclass

from shoal.core.sequence import Sequence
from shoal.core.types import PENDING, TOKEN, Finish, Output, Request, Slice, Start, Step, StepResult, Wait
from shoal.kv.cache import KVCache, Match
from shoal.sched.planning import Planning
from shoal.sched.policy import Policy, View


@dataclass(slots=True)
class Counters:
    """What the scheduler has handed out since it was made, in tokens unless said otherwise."""

    steps: int = 0
    prompt_computed: int = 0
    prompt_last: int = 0  # fully cached prompts whose last token was computed again for its hidden state
    prompt_preempted: int = 0  # of prompt_computed: had been computed before a preemption of the same row
    output_computed: int = 0
    output_preempted: int = 0  # of output_computed: likewise
    preemptions: int = 0  # events
    vain: int = 0  # of them: of rows that had not repaid the last one
    cached: int = 0  # prompt tokens found at a first start


class Scheduler:
    """Owns every sequence from `add` to its one Finish. `reuse=False` switches prefix sharing off, as a control."""

    def __init__(
        self, policy: Policy, num_blocks: int, block_size: int, reuse: bool = True, remedy: str = "raise --memory"
    ) -> None:
        """`remedy` is what gives a row more memory than all that there is now."""
        self.policy, self.remedy = policy, remedy
        self.kv = KVCache(num_blocks, block_size, policy.worth, reuse)
        self.waiting: dict[int, Sequence] = {}  # by number
        self.running: dict[int, Sequence] = {}  # by ticket
        self.counters = Counters()
        self.in_flight = 0  # steps planned and not committed
        self._by_id: dict[str, Sequence] = {}
        self._ended: list[Output] = []  # found out while planning
        self._drops: list[int] = []
        self._numbers = self._tickets = 0
        self._top_index = self.top_started = -1  # highest plan index seen, and started
        self._unstarted: list[int] = []  # heap of plan indices, with some that have started since
        self._waiting_indices: set[int] = set()
        self.overfull = False  # a row lost its memory in vain, and nobody has ended since
        self._furthest: dict[int, int] = {}  # number -> positions computed before its preemption

    # -- requests ----------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Output | None:
        """Queue the request. An Output means it was refused, and says why."""
        why = self._impossible(request) or self.policy.accept(request, self.view(now))
        if why:
            return Output(request.id, finish=Finish.REJECT, error=why)
        self._numbers += 1
        seq = Sequence(request, self._numbers)
        self._by_id[request.id] = seq
        self._enqueue(seq)
        return None

    def _enqueue(self, seq: Sequence) -> None:
        self.waiting[seq.number] = seq
        index = seq.request.index
        if index >= 0:
            self._top_index = max(self._top_index, index)
            self._waiting_indices.add(index)
            heapq.heappush(self._unstarted, index)

    def _dequeue(self, seq: Sequence) -> None:
        del self.waiting[seq.number]
        self._waiting_indices.discard(seq.request.index)

    def _impossible(self, request: Request) -> str:
        if request.id in self._by_id:
            return f"the id {request.id!r} is in use by a request that has not ended"
        if not request.prompt:
            return "the prompt is empty: give it at least one token"
        least = request.goal + (max(request.sampling.min_tokens, 1) - 1 if request.samples else 0)
        holds = self.kv.pool.num_blocks * self.kv.block_size
        if least > holds:
            return (
                f"kv_exhausted: needs {least} tokens of KV memory; {holds} are available: "
                f"shorten the prompt or {self.remedy}"
            )
        return ""

    def cancel(self, id: str, now: float) -> Output | None:
        """End a request; None if there is none of that id."""
        seq = self._by_id.get(id)
        return self.finish(seq, [], Finish.CANCEL, now) if seq else None

    def live(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [*self.running.values(), *self.waiting.values()]

    def view(self, now: float) -> View:
        """The state as a policy may see it."""
        pool = self.kv.pool
        running, waiting = list(self.running.values()), list(self.waiting.values())
        return View(now, pool.num_free, self.kv.in_use, pool.num_blocks, self.kv.block_size, running, waiting)

    def take_ended(self) -> list[Output]:
        """Requests that ended while a step was planned, once."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def steps(self) -> int:
        """Steps planned so far."""
        return self.counters.steps

    @property
    def horizon(self) -> int:
        """The lowest plan index that has not started."""
        heap = self._unstarted
        while heap and heap[0] not in self._waiting_indices:
            heapq.heappop(heap)
        return heap[0] if heap else self._top_index + 1

    # -- plan --------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step | Wait | None:
        """The next step; None when everything there is awaits a step in flight, or nothing is there."""
        self.kv.expire(self.horizon)
        view = self.view(now)
        for node in self.policy.revalued(view):
            self.kv.revalue(node)
        work = Planning(self, view)
        work.hand_out()
        if not work.slices and not self.in_flight and (self.waiting or self.running):
            if not self.running and now < work.wait_until < math.inf:
                return Wait(work.wait_until)
            work.force()
        if not work.slices:
            return None
        self.counters.steps += 1
        self.in_flight += 1
        drops, self._drops = self._drops, []
        return Step(self.counters.steps, tuple(work.slices), tuple(work.starts), tuple(work.moves), tuple(drops))

    # -- commit ------------------------------------------------------------------------------------

    def commit(self, step: Step, result: StepResult, now: float) -> list[Output]:
        """Make the step's result true: extend sequences, deliver scores, finish the finished."""
        self.in_flight -= 1
        outputs = []
        for part in step.slices:
            seq = self.running.get(part.ticket)
            if seq is None:
                continue  # it was cancelled, preempted or finished while the step ran
            output = self._commit(seq, part, result, now)
            if output is not None:
                outputs.append(output)
        return outputs

    def _commit(self, seq: Sequence, part: Slice, result: StepResult, now: float) -> Output | None:
        ticket, end = part.ticket, part.start + len(part.tokens)
        error = result.errors.get(ticket) if result.errors else None
        if error:
            return self.finish(seq, [], Finish.ERROR, now, error)
        new = result.tokens.get(ticket)
        done: Finish | None = None
        if part.draft:
            seq.guessing = False
        if new:
            forced, sampled = result.forced.get(ticket) if result.forced else None, len(new)
            if len(new) == 1 and not forced and end < seq.limit:
                seq.tokens[end] = new[0]
            else:
                new = self._cut(seq, end, [*new, *(forced or ())])
                # A token that was planned to be sampled behind the first one is known now: its step samples none.
                seq.tokens[end:] = array(TOKEN, new)
            if part.draft:
                seq.computed = end + min(sampled, len(new)) - 1
            if seq.first_token is None:
                seq.first_token = now
            if new[-1] in seq.stop:
                done = Finish.STOP
            elif end + len(new) >= seq.limit:
                done = Finish.LENGTH
        elif not seq.samples and end >= seq.goal:
            done = Finish.LENGTH if seq.request.sampling.max_tokens == 0 else Finish.STOP
        scores = result.scores.get(ticket, []) if result.scores else []
        if scores:
            seq.scored = end if end < seq.num_prompt - 1 else -1
        if done:
            output = self.finish(seq, new or [], done, now)
        elif new or scores:
            output = Output(seq.request.id, new or [])
        else:
            return None
        output.scores = scores
        if result.logprobs:
            output.logprobs = result.logprobs.get(ticket, [])[: len(output.tokens)]
        if result.vectors:
            output.vector = result.vectors.get(ticket)
        return output

    @staticmethod
    def _cut(seq: Sequence, at: int, tokens: list[int]) -> list[int]:
        """`tokens`, which start at position `at`, up to the first stop token or the limit."""
        tokens = tokens[: seq.limit - at]
        for i, token in enumerate(tokens):
            if token in seq.stop:
                return tokens[: i + 1]
        return tokens

    # -- the life of a sequence --------------------------------------------------------------------

    def begin(self, seq: Sequence, match: Match, now: float) -> Start:
        """Let a waiting sequence run: it gets a ticket."""
        self._dequeue(seq)
        self.top_started = max(self.top_started, seq.request.index)
        self._tickets += 1
        seq.ticket = self._tickets
        if seq.preemptions:  # a token for each block of what it computes again, and be it one
            seq.keep_until = len(seq.tokens) + max(1, -(-(len(seq.tokens) - match.tokens) // self.kv.block_size))
        self.running[seq.ticket] = seq
        if seq.started is None:
            seq.started, seq.cached = now, min(match.tokens, seq.num_prompt)
            self.counters.cached += seq.cached
            self.counters.prompt_last += match.whole
        return Start(seq.ticket, seq.request, seq.outputs)

    def _stop(self, seq: Sequence, again: bool) -> None:
        if seq.running:
            del self.running[seq.ticket]
            self._drops.append(seq.ticket)
            seq.ticket = -1
        else:
            self._dequeue(seq)
        if again:
            self._enqueue(seq)  # before the release: what it needs again is not past
        self.kv.release(seq, self.horizon, self.counters.steps, again)

    def preempt(self, seq: Sequence) -> None:
        """Take everything from a running sequence; it waits again with what it has produced."""
        if not seq.yields:
            self.overfull = True
            self.counters.vain += 1
        self._furthest[seq.number] = max(self._furthest.get(seq.number, 0), seq.computed)
        if seq.tokens[-1] == PENDING:
            seq.tokens.pop()  # its value will come too late; it is computed again
        seq.computed = min(seq.computed, len(seq.tokens))
        self._stop(seq, again=True)
        seq.preemptions += 1
        seq.guessing = False
        self.counters.preemptions += 1

    def finish(self, seq: Sequence, new: list[int], why: Finish, now: float, error: str = "") -> Output:
        """End a sequence, once."""
        if seq.tokens[-1] == PENDING:
            seq.tokens.pop()
        self._stop(seq, again=False)
        self.overfull = False
        del self._by_id[seq.request.id]
        self._furthest.pop(seq.number, None)
        self.policy.retire(seq, why, self.view(now))
        timing = {
            "arrival": seq.request.arrival,
            "start": seq.started if seq.started is not None else now,
            "first": seq.first_token if seq.first_token is not None else now,
            "end": now,
            "cached": float(seq.cached),
            "preemptions": float(seq.preemptions),
        }
        return Output(seq.request.id, new, why, error, timing=timing)

    def end(self, seq: Sequence, error: str, now: float) -> None:
        """While planning: the sequence cannot go on."""
        self._ended.append(self.finish(seq, [], Finish.ERROR, now, error))

    @property
    def has_preempted(self) -> bool:
        """Whether anything that lives was preempted, so that computed tokens may have been computed before."""
        return bool(self._furthest)

    def count(self, seq: Sequence, start: int, count: int) -> None:
        """Account for `count` tokens of `seq` computed from `start` on."""
        counters, prompt = self.counters, seq.num_prompt
        if start >= prompt and not self._furthest:
            counters.output_computed += count
            return
        of_prompt = max(0, min(start + count, prompt) - start)
        counters.prompt_computed += of_prompt
        counters.output_computed += count - of_prompt
        furthest = self._furthest.get(seq.number, 0) if self._furthest else 0
        if furthest > start:
            again = max(0, min(furthest, prompt, start + count) - start)
            counters.prompt_preempted += again
            counters.output_preempted += min(furthest, start + count) - start - again
