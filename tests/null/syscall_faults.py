"""Runs a job in a child whose system calls are written down or refused (syscall_faults.c), and replays disks.

It sees SQLite and the job's own files alike, so that a machine can be stopped between any two operations of either.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from durable_job import Job, shuffled
from faulty import LOSSES, Disk, Loss
from retried_job import RetryJob
from whole_job import WholeJob

import shoal.jobs.journal
from shoal.core.errors import ShoalError
from shoal.jobs.files import DiskFiles

HERE = Path(__file__).parent
NETWORK = "1 0 0:1 / / rw - nfs4 server:/home rw"  # makes every folder one of a network file system


@dataclass(frozen=True)
class Operation:
    """One change asked of the file system: made, written, truncated, synced, renamed or unlinked."""

    kind: str
    path: Path
    target: Path
    offset: int
    data: bytes


@dataclass(frozen=True)
class Setting:
    """What runs: how many rows, on which kind of file system, and whether it is the main job or its results alone."""

    rows: int
    network: bool = False
    whole: bool = False
    step: int = 1  # every so many operations are tried
    retry: bool = False  # whether it is results whose failed rows run again

    def job(self, root: Path) -> Job | WholeJob | RetryJob:
        if self.retry:
            return RetryJob(root, self.rows)
        if self.whole:
            return WholeJob(root, self.rows)
        lines = tuple(line for line in range(1, self.rows + 1) if line % 11)
        return Job(root, lines, shuffled(lines, seed=2), seconds=0.4)


def compiler() -> str | None:
    """Return a C compiler, if this machine has one and can preload what it makes."""
    return shutil.which("cc") if sys.platform == "linux" else None


def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    library = folder / "syscall_faults.so"
    command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "syscall_faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def child(library: Path, root: Path, log: Path | None, setting: Setting, *mode: str) -> str:
    """Run this file as a child under the library and return what it printed."""
    root.mkdir()
    environment = os.environ | {"LD_PRELOAD": str(library), "FAULT_ROOT": str(root)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    if log is not None:
        environment["FAULT_LOG"] = str(log)
    command = [sys.executable, str(HERE / "syscall_faults.py"), str(root), json.dumps(asdict(setting)), *mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(library: Path, folder: Path, setting: Setting) -> list[Operation]:
    """Return everything an unbroken run asks of its files."""
    log = folder / "log"
    child(library, folder / "recorded", log, setting, "record")
    return list(_parse(log.read_bytes()))


def _parse(raw: bytes) -> Iterator[Operation]:
    at = 0
    while at < len(raw):
        kind, first, second, offset, length = struct.unpack_from("=c4Q", raw, at)
        at += struct.calcsize("=c4Q")
        names = raw[at : at + first + second].decode()
        at += first + second
        yield Operation(kind.decode(), Path(names[:first]), Path(names[first:]), offset, raw[at : at + length])
        at += length


def apply(operation: Operation, disk: Disk) -> None:
    """Do an operation on the disk's model."""
    path = operation.path
    match operation.kind:
        case "O":
            disk.make(path)
        case "W":
            disk.make(path).pending.append((operation.offset, operation.data))
        case "T":
            disk.make(path).pending.append((operation.offset, None))
        case "S" if path.is_dir():
            disk.sync_folder(path)
        case "S":
            disk.make(path).sync()
        case "R":
            disk.rename(path, operation.target)
        case "U":
            disk.remove(path)


def replay(operations: list[Operation], folder: Path, setting: Setting, losses: tuple[Loss, ...] = LOSSES) -> int:
    """Stop the machine after each operation, restart, and hold the files against an unbroken run's.

    Returns the number of restarts.
    """
    recorded = folder / "recorded"
    wanted = setting.job(recorded).final()
    for path in sorted(recorded.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else None  # the model must not take what stands there now for durable
    disk, restarts, promised = Disk(), 0, 0
    for number in range(len(operations) + 1):
        for loss in losses if number % setting.step == 0 else ():
            root = folder / f"stopped{number}{loss}"
            root.mkdir()
            for path, data in disk.after(loss, Random(number)).items():
                if data is not None:
                    found = root / path.relative_to(recorded)
                    found.parent.mkdir(exist_ok=True)
                    found.write_bytes(data)
            again = setting.job(root)
            assert len(again.journalled()) >= promised, f"stopped after operation {number}: committed rows are {loss}"
            again.run(DiskFiles())
            assert again.final() == wanted, f"stopped after operation {number}, unsynced writes {loss}"
            restarts += 1
            shutil.rmtree(root)
        if number < len(operations):
            apply(operations[number], disk)
            if operations[number].path.name == "promises" and operations[number].data:
                promised = int(operations[number].data)
    return restarts


def refuse(library: Path, folder: Path, setting: Setting, error: int, sticky: bool) -> dict[str, int]:
    """Refuse each operation with `error`; run again without; return how many refusals were told and tolerated."""
    answer = child(library, folder / "refused", None, setting, "refuse", str(error), str(int(sticky)))
    found: dict[str, int] = json.loads(answer)
    return found


def _refuse(root: Path, setting: Setting, error: int, sticky: bool) -> dict[str, int]:
    arm = ctypes.CDLL(os.environ["LD_PRELOAD"]).fault_arm
    arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
    count = ctypes.CDLL(os.environ["LD_PRELOAD"]).fault_count
    count.restype = ctypes.c_long
    (root / "unbroken").mkdir()
    first = setting.job(root / "unbroken")
    arm(-1, 0, 0)
    code = first.run(DiskFiles())
    total, wanted = count(), first.final()
    found = {"operations": total, "told": 0, "tolerated": 0}
    for at in range(0, total, setting.step):
        folder = root / str(at)
        folder.mkdir()
        one = setting.job(folder)
        arm(at, error, sticky)
        try:
            assert one.run(DiskFiles()) == code, f"operation {at}"
            found["tolerated"] += 1
        except ShoalError as raised:
            assert raised.exit_code == 1, f"operation {at}: {raised}"
            found["told"] += 1
        except OSError as raised:
            raise AssertionError(f"operation {at}: an error that says nothing to the user: {raised}") from raised
        arm(-1, 0, 0)
        assert one.run(DiskFiles()) == code, f"operation {at}, run again"
        assert one.final() == wanted, f"operation {at} refused with {errno.errorcode[error]}"
        shutil.rmtree(folder)
    return found


def main() -> None:
    """Be the child."""
    root, setting = Path(sys.argv[1]), Setting(**json.loads(sys.argv[2]))
    if setting.network:
        shoal.jobs.journal.read_mounts = lambda: NETWORK
    if sys.argv[3] == "refuse":
        print(json.dumps(_refuse(root, setting, int(sys.argv[4]), bool(int(sys.argv[5])))))
        return
    job = setting.job(root)
    if isinstance(job, Job):
        job.promises = root / "promises"
    job.run(DiskFiles())


if __name__ == "__main__":
    main()
