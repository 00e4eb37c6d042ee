"""What is wrong with a file's lines, by a run's own checks, and what of them a run will not heed.

It must not know how a line is repaired, nor anything that needs an engine.
"""

from __future__ import annotations

import msgspec
from rich.console import Console

from shoal.jobs.body import IGNORED
from shoal.jobs.schema import ENVELOPE, unwrap
from shoal.jobs.settings import JobSettings
from shoal.jobs.terminal import said
from shoal.jobs.units import count
from shoal.preview.look import Looked
from shoal.preview.passed import Passed

SHOWN = 10  # lines of each kind on a terminal
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Fault(msgspec.Struct, frozen=True):
    """A line that a run would not answer."""

    line: int
    code: str
    message: str
    param: str | None


class Unheeded(msgspec.Struct):
    """Something that lines say and that changes no answer."""

    what: str
    lines: int
    first: int  # line


class Repair(msgspec.Struct, frozen=True):
    """A line that is another one in the repaired file."""

    line: int
    what: str


class Lint(msgspec.Struct, frozen=True):
    """The verdict on a file. `repairs` and `left` are of the repaired file, where one was asked for."""

    rows: int
    faults: tuple[Fault, ...]
    unheeded: tuple[Unheeded, ...]
    blank: int  # lines
    fixed: str = ""  # where the repaired file is
    repairs: tuple[Repair, ...] = ()
    left: int = 0  # lines of it that a run would still not answer

    @property
    def clean(self) -> bool:
        """Whether every line of the file, or of the repaired one, can be run."""
        return not (self.left if self.fixed else self.faults)


def check(looked: Looked | Passed) -> Lint:
    """The verdict on a file that has been read and planned."""
    faults = []
    for _, row in looked.plan.bad_rows():
        assert row.error is not None
        faults.append(Fault(row.line, row.error.code, str(row.error), row.error.param))
    unheeded: dict[str, Unheeded] = {}
    settings = looked.words.encoder.settings
    if not settings.plain:
        bad = {fault.line for fault in faults}
        for line, offset, length in looked.source:
            raw = None if line in bad else looked.source.read(offset, length)
            for what in _unheeded(raw, settings) if raw is not None else ():
                unheeded.setdefault(what, Unheeded(what, 0, line)).lines += 1
    blank = looked.plan.num_lines - looked.plan.num_rows
    return Lint(looked.plan.num_rows, tuple(faults), tuple(unheeded.values()), blank)


def _unheeded(raw: bytes, settings: JobSettings) -> list[str]:
    """What a good line says that no answer depends on."""
    request = unwrap(raw)[0]
    assert request is not None
    envelope = _fields.decode(request)
    body, names = _fields.decode(envelope["body"]), settings.names
    found = [f"{name!r} beside body: a note of yours" for name in envelope if name not in ENVELOPE]
    if settings.passing is not None:
        return found  # fields and models are the server's to heed
    found += [f"{name!r} in body: it changes no answer" for name in body if name in IGNORED]
    model = msgspec.json.decode(body["model"]) if "model" in body else None
    if model is not None and model not in names:
        found.append(f"the model {model!r}: {names[0]} answers (--strict refuses such lines)")
    return found


def to_json(found: Lint) -> str:
    """Every line's fault, for programs."""
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def print_lint(found: Lint, console: Console) -> None:
    """The verdict, for a person: kinds of faults with their first lines."""
    kinds: dict[str, list[Fault]] = {}
    for fault in found.faults:
        kinds.setdefault(fault.code, []).append(fault)
    for code, faults in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        console.print(said(f"{code}: {count(len(faults))}", style="bold"))
        for fault in faults[:SHOWN]:
            console.print(said(f"  line {fault.line}: {fault.message}"), soft_wrap=True)
        if len(faults) > SHOWN:
            console.print(said(f"  and {count(len(faults) - SHOWN)} more (--json has all)"))
    for each in found.unheeded:
        words = f"not heeded: {each.what}; {count(each.lines)} lines, the first is {each.first}"
        console.print(said(words), soft_wrap=True)
    console.print(said(f"{count(found.rows)} rows, {count(len(found.faults))} of them would fail"))
    for repair in found.repairs[:SHOWN]:
        console.print(said(f"  line {repair.line}: {repair.what}"), soft_wrap=True)
    if len(found.repairs) > SHOWN:
        console.print(said(f"  and {count(len(found.repairs) - SHOWN)} more (--json has all)"))
    if found.fixed:
        words = f"{found.fixed}: {count(len(found.repairs))} repairs, {count(found.left)} lines would still fail"
        console.print(said(words), soft_wrap=True)
