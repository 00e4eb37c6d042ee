"""The files of a job that runs failed rows again: written beside the old ones, whose places they take at the end.

It knows names, the journal's note of how far that is, and whether a file is still the one of before; it must not know
what its lines say. Until all rows have ended users have the files of before; a run that is killed between two renames
leaves the rest to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.core.errors import StateError
from shoal.jobs.files import MISSING, Files, disk_errors
from shoal.jobs.journal import Journal

NOTE = "retry"  # key in the journal
RUNNING, RENAMING, REMOVING = "running", "renaming", "renaming, no errors"  # "" or none: nothing runs again
BEFORE = "retry files"  # key in the journal: hashes of the files of before
_BLOCK = 1 << 20


class Swap:
    """Where the job's files are written now, and how they come where they belong."""

    def __init__(self, journal: Journal, files: Files, out: Path | None, errors: Path | None) -> None:
        """`out` and `errors` are the files that grow line by line; None for one that the job does not have."""
        self._journal, self._files = journal, files
        self._folder = journal.path.parent
        self._out, self._errors = out, errors

    @property
    def active(self) -> bool:
        """Whether failed rows run again, and lines go beside the old files."""
        return bool(self._journal.meta(NOTE))

    def begin(self, lines: Sequence[int]) -> None:
        """Have the journal forget these lines, which are answered again beside the files of before.

        Both files must stand as the journal has them, durably: nothing else knows the forgotten lines any more.
        """
        if self.active:
            # What an earlier call began may have the lines in it: it is written anew. The journal comes first, for a
            # file that it does not count on may be missing.
            self._journal.reopen((), NOTE, RUNNING)
            with disk_errors(self._folder):
                for _, path in self._both():
                    self._files.remove(self._beside(path))
                self._files.sync_folder(self._folder)
        else:
            self._journal.set_meta(BEFORE, json.dumps({name: self._hash(path) for name, path in self._both()}))
        self._journal.reopen(lines, NOTE, RUNNING)

    def mend(self) -> None:
        """Rename what a run left that was killed when it renamed. What a disk has lost of it is written again."""
        phase = self._journal.meta(NOTE)
        if phase not in (RENAMING, REMOVING):
            return
        written = self._journal.written()
        sizes = [(self._out, written.out_bytes), (None if phase == REMOVING else self._errors, written.errors_bytes)]
        if any(path is not None and self._size(self._beside(path)) == MISSING and self._size(path) != size
               for path, size in sizes):  # fmt: skip
            self._journal.reopen((), NOTE, RUNNING)
        else:
            self._check(phase)
            self._rename()

    def place(self, path: Path) -> Path:
        """Where the lines of this file go now."""
        return self._beside(path) if self.active else path

    def finish(self) -> None:
        """Both files are complete and durable: put them in their places."""
        if self.active:
            fails = self._errors is not None and self._size(self._beside(self._errors)) != MISSING
            phase = RENAMING if fails or self._errors is None else REMOVING
            self._check(phase)
            self._journal.set_meta(NOTE, phase)
            self._rename()

    def _check(self, phase: str) -> None:
        """Refuse to write over a file that somebody has edited since the journal forgot lines of it."""
        before = json.loads(self._journal.meta(BEFORE) or "{}")  # none where an earlier version has begun
        for name, path in self._both():
            goes = self._size(self._beside(path)) != MISSING or (phase == REMOVING and path == self._errors)
            if not goes or name not in before or (found := self._hash(path)) in ("", before[name]):
                continue
            if found != self._hash(self._beside(path)):  # the same may stand there since a power cut
                raise StateError(
                    f"{path} was edited while failed rows ran again, and their answers would replace it: move it away "
                    "to keep it, then run the same command again"
                )

    def _rename(self) -> None:
        for _, path in self._both():
            with disk_errors(path):
                if self._size(self._beside(path)) != MISSING:
                    self._files.replace(self._beside(path), path)
                elif path is self._errors and self._journal.meta(NOTE) == REMOVING:
                    self._files.remove(path)
                self._files.sync_folder(path.parent)
                self._files.sync_folder(self._folder)
        self._journal.set_meta(NOTE, "")

    def _both(self) -> Iterator[tuple[str, Path]]:
        """The files that the job has, by what they are."""
        for name, path in (("output", self._out), ("errors", self._errors)):
            if path is not None:
                yield name, path

    def _beside(self, path: Path) -> Path:
        return self._folder / ("retried.output" if path == self._out else "retried.errors")

    def _size(self, path: Path) -> int:
        with disk_errors(path):
            return self._files.size(path)

    def _hash(self, path: Path) -> str:
        """A hash over a file; '' when it is missing."""
        if self._size(path) == MISSING:
            return ""
        digest, offset = hashlib.sha256(), 0
        with disk_errors(path):
            file = self._files.open(path)
            try:
                while block := file.read(offset, _BLOCK):
                    digest.update(block)
                    offset += len(block)
            finally:
                file.close()
        return digest.hexdigest()
