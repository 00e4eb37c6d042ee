"""The files of a plan: tables, arrays and row errors in one folder, complete when plan.json is there.

It knows names, checksums and column layouts; it must not know how a plan is made or what it is used for.
"""

from __future__ import annotations

import json
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.core.errors import RowError, StateError

FORMAT = 3  # of the folder; another number means: make the plan again
SUMMARY = "plan.json"
ARENA = "prompts.i32"
ERRORS = "bad_rows.jsonl"
ARRAYS = (
    "rows", "units", "asks", "copies", "order", "index", "future_start", "future_depth", "future_index", "error_end",
)  # fmt: skip

ROW = np.dtype([("line", "<i8"), ("offset", "<i8"), ("length", "<i8"), ("prompts", "<i4"), ("error", "<i4")])
"""One input row: line number from 1, place in the source [bytes], number of prompts, number of its error or -1."""

UNIT = np.dtype(
    [
        ("offset", "<i8"),  # in the arena [tokens]
        ("row", "<i4"),
        ("prompt", "<i4"),  # number of the prompt within its row
        ("length", "<i4"),  # [tokens]
        ("goal", "<i4"),  # prompt tokens that must be computed
        ("reach", "<i4"),  # the most tokens it may take from other prompts; -1: all
        ("samples", "<i4"),
        ("limit", "<i4"),  # the most output tokens of one sample
        ("root", "<i4"),
        ("expect", "<f4"),  # expected output tokens of one sample; -1: unknown
    ]
)
"""One prompt to compute. Units are in file order; those of a row follow each other."""

COPY = np.dtype([("original", "<i4"), ("row", "<i4")])
"""A row that asks for what an earlier one asks for: both numbers. It has no units."""

_CHUNK = 1 << 22


class ErrorFile:
    """Row errors, appended one by one; `ends[i]` is where the i-th ends in the file [bytes]."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 16)
        self.ends = array("q")

    def append(self, error: RowError) -> int:
        """Append one error; returns its number."""
        line = json.dumps([error.code, str(error), error.param]).encode() + b"\n"
        self._file.write(line)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(line))
        return len(self.ends) - 1

    def close(self) -> None:
        self._file.close()


def read_error(path: Path, start: int, end: int) -> RowError:
    """The row error at bytes start … end of an error file."""
    with open(path, "rb") as file:
        file.seek(start)
        code, message, param = json.loads(file.read(end - start))
    return RowError(message, code, param)


def save(folder: Path, key: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], totals: dict[str, Any]) -> None:
    """Write the arrays, then the summary by rename.

    Nothing waits for the disk: what a power cut loses, the checksums find, and the plan is made again.
    """
    for name in ARRAYS:
        np.save(_path(folder, name), arrays[name])
    files = {name: _checked(folder / name) for name in _names() if name != ARENA}
    part = folder / (SUMMARY + ".part")
    part.write_text(json.dumps({"format": FORMAT, "key": key, "files": files, **totals}, indent=1), encoding="utf-8")
    part.replace(folder / SUMMARY)


def load_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a plan in this version's format; None when there is no such plan. Raises StateError if torn."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StateError(f"{folder / SUMMARY} is damaged: {error}. Remove {folder}; it is made again.") from error
    return summary if isinstance(summary, dict) and summary.get("format") == FORMAT else None


def verify(folder: Path, summary: dict[str, Any]) -> None:
    """Compare every file but the arena, which checks itself, with its checksum. Raises StateError."""
    for name, expected in summary["files"].items():
        path = folder / name
        if not path.exists() or _checked(path) != expected:
            raise StateError(f"{path} is damaged: its checksum differs. Remove {folder}; it is made again.")


def load_arrays(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays, memory-mapped and read-only."""
    return {name: np.load(_path(folder, name), mmap_mode="r") for name in ARRAYS}


def clear(folder: Path) -> None:
    """Remove a plan; the summary first, so that half a plan is never taken for one."""
    for name in (SUMMARY, *_names()):
        (folder / name).unlink(missing_ok=True)


def _names() -> tuple[str, ...]:
    return (ARENA, ERRORS, *(f"{name}.npy" for name in ARRAYS))


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _checked(path: Path) -> list[int]:
    """[bytes, crc32] of a file, read through a small buffer."""
    crc = size = 0
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
            size += len(data)
    return [size, crc]
