"""The state folder of a job: who works on it, what the job is, whether it may go on. It must not know its results.

The folder stands beside the output. Its manifest says everything that an answer depends on, so that a job goes on
only where it would have gone on by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from shoal.core.errors import StateError, UsageError
from shoal.jobs.files import MISSING, Files, disk_errors, write_whole

MANIFEST = "manifest.json"
FINISHED = "finished.json"
LOCK = "lock"
HASHES = "hashes.json"

# Parameters that make requests of lines, and lines of answers: a request's key has what they come to.
_OF_LINES = frozenset(("model", "strict", "seed", "prompt", "chat", "body", "openai", "created"))

_T = TypeVar("_T")
_BLOCK = 1 << 20
_LARGEST = 1 << 26  # bytes of a state file that is read whole


@dataclass(frozen=True)  # without slots: a property is kept
class Manifest:
    """Everything an answer depends on. Hashes are hexadecimal SHA-256."""

    input: str  # of the file's content
    model: Mapping[str, str]  # file name -> hash: configuration and weights
    tokenizer: str
    template: str
    parameters: Mapping[str, object]  # JSON values: prompt template, sampling defaults, context length, …
    weight_mode: str
    kv_mode: str
    instruction_set: str
    versions: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> hash
    layout: Mapping[str, object] = field(default_factory=dict)  # where and when lines are written, not what they say

    @property
    def hash(self) -> str:
        """Return one hash over all of it."""
        return _hash_of(asdict(self))

    @cached_property  # asked for with every row
    def answers(self) -> str:
        """Return one hash over all but input file and layout: with a line's body it decides the line's answer."""
        return _hash_of(asdict(self) | {"input": "", "layout": {}})

    @property
    def engine(self) -> str:
        """Return one hash over what turns requests into answers: with a request's key it decides the answer."""
        parameters = {name: value for name, value in self.parameters.items() if name not in _OF_LINES}
        return _hash_of(asdict(self) | {"input": "", "layout": {}, "parameters": parameters})


def _hash_of(values: Mapping[str, object]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def row_key(manifest: Manifest, body: bytes) -> bytes:
    """Return the journal key of a row: 16 bytes of hash over its body and all else that decides its answer."""
    return hashlib.blake2b(body, digest_size=16, key=bytes.fromhex(manifest.answers)).digest()


def compare(old: Manifest, new: Manifest) -> list[str]:
    """Return what differs, one named difference each; empty when an answer of one is an answer of the other."""
    found: list[str] = []
    for name in (one.name for one in fields(Manifest)):
        found += _differences(name, _plain(getattr(old, name)), _plain(getattr(new, name)))
    return found


def _plain(value: object) -> object:
    """Return the value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _differences(name: str, old: object, new: object) -> list[str]:
    if old == new and type(old) is type(new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [one for key in sorted(old | new) for one in _differences(f"{name} {key}", old.get(key), new.get(key))]
    return [f"{name} was {_short(old)}, is {_short(new)}"]


def _short(value: object) -> str:
    if value is None:
        return "absent"
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:16]}…"


@dataclass(frozen=True, slots=True)
class Finished:
    """How a job ended, and the sizes of its files then (bytes, by name)."""

    exit_code: int
    sizes: dict[str, int]


class Begin(Enum):
    """How a job begins."""

    FRESH = "fresh"
    RESUME = "resume"
    FINISHED = "finished"


class StateFolder:
    """The locked state folder of one output. Made by `open_state`; changed by the run that holds the lock."""

    def __init__(self, path: Path, outputs: tuple[Path, ...], files: Files, lock: int) -> None:
        self.path = path
        self._outputs = outputs
        self._files = files
        self._lock = lock

    def begin(self, manifest: Manifest) -> Begin:
        """Say whether the job starts, goes on or is finished; a job that is not the folder's is a StateError."""
        old = self.manifest()
        if old is None:
            write_whole(self._files, self.path / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
            return Begin.FRESH
        differences = compare(old, manifest)
        if differences:
            raise StateError(
                f"{self._outputs[0]} belongs to another job: {'; '.join(differences)}. "
                "Start over with --restart, or choose another output"
            )
        return Begin.RESUME if self.exit_code() is None else Begin.FINISHED

    def manifest(self) -> Manifest | None:
        """Return the manifest that stands in the folder; None before the first `begin`."""
        return self._read(MANIFEST, Manifest)

    def finish(self, exit_code: int) -> None:
        """Note that the job has ended with all its files complete."""
        with disk_errors(self.path):
            sizes = {path.name: self._files.size(path) for path in self._outputs}
        write_whole(self._files, self.path / FINISHED, msgspec.json.encode(Finished(exit_code, sizes)))

    def exit_code(self) -> int | None:
        """Return how the finished job ended; None when it is not finished. Outputs of other sizes are a StateError."""
        found = self._read(FINISHED, Finished)
        if found is None:
            return None
        for path in self._outputs:
            now, was = self._files.size(path), found.sizes.get(path.name, MISSING)
            if now != was:
                said = "is missing" if now == MISSING else f"has {now} bytes"
                raise StateError(
                    f"the job is finished, but {path} {said} where it had {max(was, 0)}: bring it back as it was, "
                    "start over with --restart, or choose another output"
                )
        return found.exit_code

    def reopen(self) -> None:
        """Note that the job has not ended after all; its files stay as they are."""
        with disk_errors(self.path):
            self._files.remove(self.path / FINISHED)
            self._files.sync_folder(self.path)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def clear(self) -> None:
        """Forget the job: remove its outputs and all of its state but the lock and the hashes of model files."""
        with disk_errors(self.path):
            for path in self._outputs:
                self._files.remove(path)
                self._files.sync_folder(path.parent)
            kept = {LOCK, HASHES}
            names = sorted(one.name for one in self.path.iterdir() if one.is_file() and one.name not in kept)
            # The manifest goes last: until then the folder is not taken for one that never began.
            for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
                self._files.remove(self.path / name)
            self._files.sync_folder(self.path)

    def _read(self, name: str, form: type[_T]) -> _T | None:
        path = self.path / name
        with disk_errors(path):
            if self._files.size(path) == MISSING:
                return None
            file = self._files.open(path)
            try:
                raw = file.read(0, _LARGEST)
            finally:
                file.close()
        try:
            return msgspec.json.decode(raw, type=form)
        except msgspec.MsgspecError as error:
            raise StateError(
                f"{path} is damaged ({error}): bring it back from a copy, or start over with --restart"
            ) from error


def folder_of(out: Path) -> Path:
    """Return where the state of an output stands."""
    return out.with_name(out.name + ".shoal")


def open_state(
    out: Path, errors: Path | None, files: Files, *, restart: bool = False, overwrite: bool = False
) -> StateFolder:
    """Lock the state folder of `out`, made when missing. Held by another run it is a StateError that says by whom.

    An output without a job is a StateError unless `overwrite`; `restart` forgets the job that was there.
    """
    folder = folder_of(out)
    outputs = (out,) if errors is None else (out, errors)
    for path in outputs:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file: choose another output")
    _check(folder, outputs, files, restart or overwrite)
    with disk_errors(folder):
        files.make_folder(folder)
        files.sync_folder(folder.parent)
        state = StateFolder(folder, outputs, files, _take(folder / LOCK))
    done = False
    try:
        known = _check(folder, outputs, files, restart or overwrite)  # again: another run may have ended just now
        if restart or not known:
            state.clear()
        done = True
    finally:
        if not done:
            state.close()
    return state


def _check(folder: Path, outputs: tuple[Path, ...], files: Files, allowed: bool) -> bool:
    """Return whether a job has begun in `folder`; without one, outputs that exist are refused unless allowed."""
    with disk_errors(folder):
        known = files.size(folder / MANIFEST) != MISSING
        found = [path for path in outputs if files.size(path) != MISSING]
    if found and not known and not allowed:
        raise StateError(
            f"{found[0]} exists, and no job of it is known ({folder} is not there or never began): "
            "write over it with --overwrite, or choose another output"
        )
    return known


def _take(path: Path) -> int:
    """Return the descriptor that holds the lock; it is let go when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise StateError(
            f"{path.parent} is in use by {holder}: wait for that run, stop it, or choose another output"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise StateError(
            f"{path} cannot be locked ({error.strerror}): two runs could spoil each other; "
            "choose an output on a file system with locks"
        ) from error
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {began}\n".encode(), 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def hash_files(paths: Iterable[Path], cache: Path, files: Files) -> dict[str, str]:
    """Return name -> SHA-256 of each file's content; what did not change since `cache` was written is not read.

    A file counts as unchanged when path, size, inode and both its times are the same.
    """
    known = _known(cache, files)
    found, entries = {}, dict(known)  # others than these may be in the cache
    for path in sorted(paths):
        with disk_errors(path):
            stat = path.stat()
            mark = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            entry = known.get(str(path.resolve()))
            fresh = isinstance(entry, list) and entry[:4] == mark
            digest = str(entry[4]) if fresh and isinstance(entry, list) else _hash(path)
        found[path.name] = digest
        entries[str(path.resolve())] = [*mark, digest]
    if entries != known:
        write_whole(files, cache, json.dumps(entries).encode())
    return found


def _known(cache: Path, files: Files) -> dict[str, object]:
    """Return what the cache says; a damaged one says nothing, for it can be made again."""
    if files.size(cache) == MISSING:
        return {}
    try:
        found = json.loads(cache.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
