"""A job as its state folder tells it, at any moment: its report, how it stood, what it computed when, its prefixes.

It must not know how any of it is shown, and changes nothing. Of a folder that was copied elsewhere the texts of the
prefixes are missing where the model is, and everything else is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from shoal.core.errors import ModelError, StateError
from shoal.jobs import plan_store as store
from shoal.jobs.arena import Arena
from shoal.jobs.bill import Bill, bill
from shoal.jobs.journal import NAME as JOURNAL
from shoal.jobs.look import View
from shoal.jobs.note import read_note
from shoal.jobs.plan_arrange import facts_of
from shoal.jobs.pulse import PULSE, TIMELINE, Pulse
from shoal.jobs.report import NAME, Report
from shoal.jobs.state import MANIFEST, Manifest, folder_of
from shoal.jobs.tally import look_report
from shoal.jobs.timeline import Timeline
from shoal.show.prefixes import Forest, largest
from shoal.text.checkpoint import find_model
from shoal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Story:
    """What there is to tell of a job."""

    output: Path
    report: Report
    bill: Bill
    pulse: Pulse | None = None  # None, as the time line: a version that noted none has begun the job
    timeline: Timeline | None = None
    forest: Forest | None = None
    no_forest: str = ""  # why there is none, or no text in it


def tell(output: Path, price: float | None = None, watts: float | None = None) -> Story:
    """All of it. A StateError where there is no job."""
    report = look_report(output)
    wall = report.seconds.wall
    pulse, timeline = noted(output)
    forest, why = _forest(output)
    return Story(output, report, bill(wall, wall, price, watts), pulse, timeline, forest, why)


def noted(output: Path) -> tuple[Pulse | None, Timeline | None]:
    """How the job stood when it last said so, and what it has computed when."""
    folder = folder_of(output)
    if (folder / NAME).is_file() and not (folder / JOURNAL).exists():
        return None, None  # a folder whose journal somebody has thrown away has its report still
    with View(output) as view:
        return view.read(PULSE, Pulse), view.read(TIMELINE, Timeline)


def _forest(output: Path) -> tuple[Forest | None, str]:
    """The prefixes of the plan that the job has left on the disk, or why there are none."""
    folder = folder_of(output)
    try:
        summary = store.load_summary(folder)
        if summary is None:
            return None, f"there is no finished plan in {folder}"
        store.verify(folder, summary)
        facts = facts_of(np.asarray(store.load_arrays(folder)["units"]), Arena(folder / store.ARENA, verify=True))
    except StateError as error:
        return None, str(error)
    if summary["key"]["order"] == "length":
        return None, "an encoder takes every text by itself"
    tokenizer, why = _tokenizer(output)
    return largest(facts.prompts, facts.reach, tokenizer), why


def _tokenizer(output: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer that made the job's tokens, or why it is not here."""
    try:
        with View(output) as view:
            note = read_note(view)
        folder = find_model(note.options.model, Path(note.folder))
        if folder is None:
            return None, f"no texts: the model {note.options.model} is not on this machine"
        found = Tokenizer.load(folder)
        manifest = msgspec.json.decode((folder_of(output) / MANIFEST).read_bytes(), type=Manifest)
    except (StateError, ModelError, OSError, msgspec.MsgspecError) as error:
        return None, f"no texts: {error}"
    if found.hash != manifest.tokenizer:
        return None, f"no texts: the tokenizer in {folder} is no longer the one that the job used"
    return found, ""
