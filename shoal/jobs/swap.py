"""The files of a job that runs failed rows again: written beside the old ones, whose places they take at the end.

It knows names and the journal's note of how far that is; it must not know what stands in the files. Until all rows have
ended users have the files of before; a run that is killed between two renames leaves the rest to the next.
"""

from __future__ import annotations

from pathlib import Path

from shoal.jobs.files import MISSING, Files, disk_errors
from shoal.jobs.journal import Journal

NOTE = "retry"  # key in the journal
RUNNING, RENAMING, REMOVING = "running", "renaming", "renaming, no errors"  # "" or none: nothing runs again


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
            self._rename()

    def place(self, path: Path) -> Path:
        """Where the lines of this file go now."""
        return self._beside(path) if self.active else path

    def finish(self) -> None:
        """Both files are complete and durable: put them in their places."""
        if self.active:
            fails = self._errors is not None and self._size(self._beside(self._errors)) != MISSING
            self._journal.set_meta(NOTE, RENAMING if fails or self._errors is None else REMOVING)
            self._rename()

    def _rename(self) -> None:
        for path in (self._out, self._errors):
            if path is None:
                continue
            with disk_errors(path):
                if self._size(self._beside(path)) != MISSING:
                    self._files.replace(self._beside(path), path)
                elif path is self._errors and self._journal.meta(NOTE) == REMOVING:
                    self._files.remove(path)
                self._files.sync_folder(path.parent)
                self._files.sync_folder(self._folder)
        self._journal.set_meta(NOTE, "")

    def _beside(self, path: Path) -> Path:
        return self._folder / ("retried.output" if path == self._out else "retried.errors")

    def _size(self, path: Path) -> int:
        with disk_errors(path):
            return self._files.size(path)
