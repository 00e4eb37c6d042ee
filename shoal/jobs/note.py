"""What a job notes of itself in its journal when it starts, so that other commands know it without being told again.

It knows options and how to write them down; it must not know what any command does with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec

from shoal.core.errors import StateError
from shoal.jobs.journal import Journal
from shoal.jobs.look import View
from shoal.jobs.options import STDIN, JobOptions
from shoal.jobs.spool import SPOOL
from shoal.jobs.state import folder_of

NOTE = "job"  # key in the journal


class JobNote(msgspec.Struct, frozen=True):
    """A job as it was last started."""

    options: JobOptions
    folder: str  # in which it was started: paths in the options are seen from there


def note_of(options: JobOptions) -> str:
    """The note of a job that starts now in this folder."""
    note = JobNote(replace(options, restart=False, overwrite=False), os.getcwd())
    return msgspec.json.encode(note, enc_hook=str).decode()


def keep_note(journal: Journal, options: JobOptions) -> None:
    """Note a job that starts now, unless its journal says the same already."""
    note = note_of(options)
    if journal.meta(NOTE) != note:
        journal.set_meta(NOTE, note)


def read_note(view: View) -> JobNote:
    """The note in a journal; a StateError when a version of shoal that made none has begun the job."""
    text = view.meta(NOTE)
    if text is None:
        raise StateError(
            f"{view.path} does not say how the job was started, for an earlier version of shoal began it: run the same "
            "`shoal run` command once more, which notes it"
        )
    try:
        return msgspec.json.decode(text, type=JobNote, dec_hook=_value)
    except msgspec.MsgspecError as error:
        raise StateError(
            f"{view.path} was written by another version of shoal, whose options this one does not have ({error}): "
            "use that version"
        ) from error


@contextmanager
def options_of(note: JobNote, output: Path) -> Iterator[JobOptions]:
    """The options of a job that is to go on, to be used inside, in the folder that their paths are seen from;
    `output` is where its output stands now. What it read from standard input is in its state folder."""
    output = output.absolute()
    source = folder_of(output) / SPOOL if note.options.input == STDIN else note.options.input
    with chdir(note.folder) if Path(note.folder).is_dir() else nullcontext():
        same = note.options.output.exists() and output.exists() and note.options.output.samefile(output)
        yield replace(note.options, input=source, output=note.options.output if same else output)


def _value(kind: type, value: object) -> object:
    return value if kind is object else kind(value)
