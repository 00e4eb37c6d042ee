"""What happened in a job: counts that must add up, and report.json.

It must not know how they were counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shoal.core.errors import ShoalError, StateError
from shoal.jobs.files import Files, disk_errors, write_whole
from shoal.jobs.foretold import Compared, Foretold, compare
from shoal.jobs.state import folder_of
from shoal.jobs.units import count

NAME = "report.json"
SHOWN = 3  # slow rows named to a person


@dataclass(frozen=True, slots=True)
class Rows:
    """Input lines by how they ended; blank lines are not among them."""

    total: int = 0
    ok: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0

    @property
    def ended(self) -> int:
        return self.ok + self.failed + self.expired + self.cancelled


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of the job. Computed = bound + recomputed, but for restarts and rows that cannot share."""

    prompt: int = 0  # of all rows that could be run
    prompt_bound: int = 0  # the fewest that can be computed: every shared prefix once, whatever the memory
    prompt_computed: int = 0  # that were, prompt_recomputed included and prompt_last not
    prompt_recomputed: int = 0  # of them, those computed before and lost to memory or an interruption
    prompt_last: int = 0  # last tokens of fully shared prompts, computed again because their hidden state is needed
    output: int = 0


@dataclass(frozen=True, slots=True)
class Reused:
    """Rows that were not computed, and their tokens: in Tokens, and in their own usage, as if they had been."""

    duplicates: int = 0  # answered as an earlier row of the file
    cached: int = 0  # answered by the cache
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_prompt_tokens: int = 0  # of these, those of rows that the cache answered
    cached_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Again:
    """Tokens computed more than once, by reason. The first three and `apart` are Tokens.prompt_recomputed."""

    preempted: int = 0  # prompt tokens of rows that were put off for want of memory
    other: int = 0  # all else: shared prefixes given up for want of memory, rows that were moved up
    restarted: int = 0  # after an interruption, a dead engine or a retry; want of memory is not told apart then
    last: int = 0  # last tokens of fully shared prompts: their hidden state is needed
    output: int = 0  # of answers of rows that were put off for want of memory
    apart: int = 0  # prompt tokens that more than one engine has computed, each having none of the others' memory


@dataclass(frozen=True, slots=True)
class Engine:
    """What one of several engines has done, over all runs."""

    device: str
    rows: int = 0  # that it has completed
    prompt_computed: int = 0
    output: int = 0  # tokens it computed
    seconds: float = 0.0  # in which it had something to do


@dataclass(frozen=True, slots=True)
class Slow:
    """A row that took long, and where its time went, in seconds."""

    line: int
    queue: float = 0.0  # before it ran
    prefill: float = 0.0  # until its first token
    decode: float = 0.0  # from there to its end
    prompt_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    loop_period: int = 0  # tokens of the piece that it repeated until it was cut off; 0: it did not

    @property
    def why(self) -> str:
        """What took longest, as far as the journal knows."""
        if self.preemptions:
            return f"put off {count(self.preemptions)} times for want of memory"
        if self.loop_period:
            return f"it repeats a piece of {count(self.loop_period)} tokens, for {count(self.completion_tokens)} tokens"
        if self.prefill > self.decode:
            return f"its prompt of {count(self.prompt_tokens)} tokens, or those before it"
        return f"its answer of {count(self.completion_tokens)} tokens"


@dataclass(frozen=True, slots=True)
class Verified:
    """Answered rows that were computed again at the end; their tokens and steps are not among the job's."""

    rows: int = 0
    differ: list[int] = field(default_factory=list)  # lines that came to something else


@dataclass(frozen=True, slots=True)
class Sent:
    """What was asked of servers, which answer in place of an engine of ours, over all runs."""

    requests: int = 0  # that were sent, in vain or not
    refused: int = 0  # of them, those for which a server had no room
    broken: int = 0  # of them, those that failed in passing or were lost on the way
    prompt_cached: int = 0  # prompt tokens that the servers' own caches had, as they count them


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time went. A job that was resumed adds up its runs."""

    wall: float = 0.0
    cpu: float = 0.0  # of all processes and threads
    load: float = 0.0  # of the model, while rows are read and planned
    plan: float = 0.0  # reading, checking, tokenizing, ordering


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed lines of one error code, with one of them as an example."""

    count: int
    line: int
    message: str
    fault: str = ""  # whose: yours, ours, transient


@dataclass(frozen=True, slots=True)
class Report:
    """report.json. Fields are only ever added."""

    rows: Rows
    tokens: Tokens = Tokens()
    reused: Reused = Reused()
    verified: Verified = Verified()
    seconds: Seconds = Seconds()
    steps: int = 0
    peak_memory_bytes: int = 0  # the largest sum of resident memory over parent and engine
    versions: dict[str, str] = field(default_factory=dict)
    manifest: str = ""  # hash of manifest.json: of all that decides the answers
    plan: str = ""  # hash of the plan of the whole input
    model: str = ""
    weights: str = ""  # the arithmetic of linear layers
    kv: str = ""  # how keys and values were kept
    input: str = ""
    output: str = ""
    files: dict[str, int] = field(default_factory=dict)  # written files and their lines
    errors: dict[str, Failures] = field(default_factory=dict)  # by code
    runs: int = 1  # times the job was started
    engine_restarts: int = 0
    finished: bool = True  # every row has ended and is written
    exit_code: int = 0
    again: Again = Again()
    slowest: list[Slow] = field(default_factory=list)  # rows that ran longest, the longest first
    looped: int = 0  # rows whose answer ran into its limit while it repeated itself
    running: bool = False  # a run is at work on it now
    endpoints: list[str] = field(default_factory=list)  # the servers that answered, in the last run
    sent: Sent = Sent()
    peak_kv_bytes: int = 0  # most keys and values in use at once
    predicted: Foretold | None = None  # when the job was planned; None: nobody was asked
    engines: list[Engine] = field(default_factory=list)  # where there were several
    disagree: list[str] = field(default_factory=list)  # what two records of the job say differently

    def problems(self) -> list[str]:
        """What does not add up, in words; nothing when all is well. Such a report is our mistake, not the user's."""
        rows, tokens = self.rows, self.tokens
        found = list(self.disagree)
        if self.finished and rows.ended != rows.total:
            found.append(
                f"{rows.total} rows, but {rows.ok} ok + {rows.failed} failed + {rows.expired} expired + "
                f"{rows.cancelled} cancelled = {rows.ended}"
            )
        if rows.ended > rows.total:
            found.append(f"{rows.ended} rows ended, of only {rows.total}")
        if (by_code := sum(group.count for group in self.errors.values())) != rows.total - rows.ok and self.finished:
            found.append(f"{rows.total - rows.ok} rows are not ok, but their error codes count {by_code}")
        if tokens.prompt_bound > tokens.prompt:
            found.append(f"the bound of {tokens.prompt_bound} prompt tokens is above the {tokens.prompt} there are")
        if tokens.prompt_recomputed > tokens.prompt_computed:
            found.append(f"{tokens.prompt_recomputed} prompt tokens recomputed, of only {tokens.prompt_computed}")
        if self.reused.prompt_tokens > tokens.prompt or self.reused.output_tokens > tokens.output:
            found.append(f"{self.reused.prompt_tokens} prompt tokens were saved, of only {tokens.prompt}")
        again = self.again
        if (
            again != Again()
            and again.preempted + again.other + again.restarted + again.apart != tokens.prompt_recomputed
        ):
            found.append(f"{tokens.prompt_recomputed} prompt tokens recomputed, but their reasons count otherwise")
        if (failed := sum(group.count for group in self.errors.values())) != rows.ended - rows.ok and self.running:
            found.append(f"{rows.ended - rows.ok} rows have failed so far, but their error codes count {failed}")
        if (free := self.reused.duplicates + self.reused.cached) > rows.ok:
            found.append(f"{free} rows were answered without being computed, of only {rows.ok}")
        return found

    @property
    def status(self) -> int:
        """The exit code this report stands for: 1 when it does not add up, or a row came to something else again."""
        return 1 if self.problems() or self.verified.differ else self.exit_code


def write_report(report: Report, folder: Path, files: Files) -> None:
    """Write report.json into the job's state folder, whole or not at all."""
    path = folder / NAME
    with disk_errors(path):
        write_whole(files, path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read_report(output: Path) -> Report:
    """The report of the job that writes `output`; a StateError when there is none."""
    path = folder_of(output) / NAME
    if not path.parent.is_dir():
        raise StateError(f"no job has written {output}: there is no folder {path.parent}")
    if not path.is_file():
        raise StateError(f"{path} does not exist: the job has not ended yet; run it again and it continues")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except msgspec.DecodeError as error:
        raise ShoalError(f"{path} is not a report ({error}); run the job again, which writes it anew") from error


def to_json(report: Report, more: Mapping[str, object] | None = None) -> str:
    """The report as report.json has it, with what does not add up beside it, and `more`."""
    fields = msgspec.to_builtins(report) | {"problems": report.problems()} | dict(more or {})
    fields["compared"] = msgspec.to_builtins(compared(report))
    return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode()


def compared(report: Report) -> list[Compared]:
    """What was predicted when the job was planned, beside what it came to; nothing where nobody was asked."""
    if report.predicted is None:
        return []
    tokens = report.tokens
    output = tokens.output - report.reused.output_tokens
    return compare(report.predicted, tokens.prompt_computed, output, report.seconds.wall, report.peak_kv_bytes)
