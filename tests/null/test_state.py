"""A state folder belongs to one job and to one run at a time, and says so."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from durable_job import MANIFEST, Job, memory_folder
from faulty import LOSSES, Crash, FaultyFiles, Loss

from shoal.core.errors import StateError, UsageError
from shoal.jobs import state as state_module
from shoal.jobs.files import DiskFiles
from shoal.jobs.state import Begin, Manifest, compare, folder_of, hash_files, open_state, row_key

FILES = DiskFiles()
OTHERS: dict[str, object] = {
    "input": "aa" * 32,
    "model": {"config.json": "22" * 32, "model.safetensors": "bb" * 32},
    "tokenizer": "cc" * 32,
    "template": "dd" * 32,
    "parameters": {"max_tokens": 16, "temperature": 0.7},
    "weight_mode": "int8",
    "kv_mode": "int8",
    "instruction_set": "avx512",
    "versions": {"shoal": "0.2.0"},
    "adapters": {"poet": "ee" * 32},
    "layout": {"order": "finish"},
}


def other(name: str) -> Manifest:
    return dataclasses.replace(MANIFEST, **{name: OTHERS[name]})  # type: ignore[arg-type]


def test_every_part_of_the_manifest_has_a_difference_to_test() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Manifest)}


@pytest.mark.parametrize("name", OTHERS)
def test_another_job_is_refused_by_name(tmp_path: Path, name: str) -> None:
    out = tmp_path / "o.jsonl"
    with open_state(out, None, FILES) as state:
        assert state.begin(MANIFEST) is Begin.FRESH
    with open_state(out, None, FILES) as state:
        with pytest.raises(StateError, match=rf"belongs to another job: {name}.*--restart.*another output") as raised:
            state.begin(other(name))
        assert raised.value.exit_code == 2
        assert state.begin(MANIFEST) is Begin.RESUME
    assert MANIFEST.hash != other(name).hash
    assert (row_key(MANIFEST, b"body") == row_key(other(name), b"body")) is (name in ("input", "layout"))


def test_a_rows_key_is_its_own() -> None:
    assert len({row_key(MANIFEST, b"%d" % number) for number in range(100)}) == 100
    assert len(row_key(MANIFEST, b"")) == 16


def test_differences_are_named_to_the_part() -> None:
    found = compare(
        MANIFEST, dataclasses.replace(MANIFEST, parameters={"max_tokens": 16, "top_p": 0.5, "stop": ("a",)})
    )
    assert found == [
        'parameters stop was absent, is ["a"]',
        "parameters temperature was 0.0, is absent",
        "parameters top_p was absent, is 0.5",
    ]
    assert compare(MANIFEST, other("tokenizer")) == [f"tokenizer was {'44' * 8}…, is {'cc' * 8}…"]
    assert compare(MANIFEST, dataclasses.replace(MANIFEST)) == []


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, parameters={"stop": ("a", "b"), "bias": {"1": -1.5}, "none": None})
    for begin in (Begin.FRESH, Begin.RESUME):
        with open_state(tmp_path / "o.jsonl", None, FILES) as state:
            assert state.begin(manifest) is begin
            found = state.manifest()
    assert found is not None and found.hash == manifest.hash


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_without_a_job_is_not_touched(tmp_path: Path, which: int) -> None:
    out, errors = tmp_path / "o.jsonl", tmp_path / "o.errors.jsonl"
    path = (out, errors)[which]
    path.write_text("precious")
    with pytest.raises(StateError, match=f"{path.name} exists.*--overwrite.*another output"):
        open_state(out, errors, FILES)
    assert path.read_text() == "precious" and not folder_of(out).exists()
    with open_state(out, errors, FILES, overwrite=True) as state:
        assert not path.exists() and state.begin(MANIFEST) is Begin.FRESH


def test_overwrite_does_not_throw_away_a_job(tmp_path: Path) -> None:
    job = Job(tmp_path, range(1, 9), range(1, 9))
    job.run(FILES)
    with open_state(job.out, job.errors, FILES, overwrite=True) as state:
        assert state.begin(MANIFEST) is Begin.FINISHED


def test_a_folder_cannot_be_an_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file"):
        open_state(tmp_path, None, FILES)
    with pytest.raises(UsageError, match="No such file or directory"):
        open_state(tmp_path / "absent" / "o.jsonl", None, FILES)


def test_a_second_run_is_told_who_holds_the_job(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with open_state(out, None, FILES):
        code = (
            "import sys; from pathlib import Path; from shoal.core.errors import ShoalError\n"
            "from shoal.jobs.state import open_state; from shoal.jobs.files import DiskFiles\n"
            "try: open_state(Path(sys.argv[1]), None, DiskFiles(), restart=True)\n"
            "except ShoalError as error: print(error); sys.exit(error.exit_code)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"in use by process {os.getpid()} on" in done.stdout and "since 20" in done.stdout


def test_one_process_cannot_hold_a_job_twice(tmp_path: Path) -> None:
    with open_state(tmp_path / "o.jsonl", None, FILES):
        with pytest.raises(StateError, match="in use by process"):
            open_state(tmp_path / "o.jsonl", None, FILES)
    open_state(tmp_path / "o.jsonl", None, FILES).close()


def test_what_a_dead_process_left_is_no_obstacle(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "o.jsonl")
    folder.mkdir()
    (folder / "lock").write_text("process 1 on here, since 1970-01-01 00:00:00\n" * 9)
    with open_state(tmp_path / "o.jsonl", None, FILES):
        assert (folder / "lock").read_text().count("\n") == 1


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StateError, match="cannot be locked .No locks available"):
        open_state(tmp_path / "o.jsonl", None, FILES)


def test_a_finished_job_is_recognised_with_its_exit_code(tmp_path: Path) -> None:
    job = Job(tmp_path, range(1, 9), range(1, 9))
    job.run(FILES)
    before = job.final()
    assert job.run(FILES) == 3 and job.final() == before and max(job.generated.values()) == 1
    with job.out.open("ab") as file:
        file.write(b"mine\n")
    with pytest.raises(StateError, match=r"finished, but .*answers.jsonl has \d+ bytes where it had"):
        job.run(FILES)
    job.out.unlink()
    with pytest.raises(StateError, match="answers.jsonl is missing"):
        job.run(FILES)


@pytest.mark.parametrize("name", ["manifest.json", "finished.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"input": 3}', b"\xff"])
def test_damaged_state_says_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    job = Job(tmp_path, range(1, 9), range(1, 9))
    job.run(FILES)
    (folder_of(job.out) / name).write_bytes(content)
    with pytest.raises(StateError, match=f"{name} is damaged.*--restart"):
        job.run(FILES)


def restarted(root: Path) -> Job:
    """Return a finished job's successor: other parameters, one line fewer."""
    Job(root, range(1, 9), range(1, 9)).run(FILES)
    (folder_of(root / "answers.jsonl") / "arena").mkdir()
    return Job(root, range(1, 8), range(1, 8), manifest=other("parameters"))


def test_restart_forgets_the_job_and_keeps_the_hashes(tmp_path: Path) -> None:
    job = restarted(tmp_path)
    (folder_of(job.out) / "hashes.json").write_text("{}")
    with open_state(job.out, job.errors, FILES, restart=True) as state:
        assert sorted(path.name for path in state.path.iterdir()) == ["arena", "hashes.json", "lock"]
        assert not job.out.exists() and not job.errors.exists()
        assert state.begin(job.manifest) is Begin.FRESH


@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_while_restarting_never_mixes_two_jobs(loss: Loss) -> None:
    with memory_folder() as folder:
        (folder / "wanted").mkdir()
        wanted = Job(folder / "wanted", range(1, 8), range(1, 8), manifest=other("parameters"))
        wanted.run(FILES)
        for at in range(30):
            root = folder / str(at)
            root.mkdir()
            job = restarted(root)
            files = FaultyFiles(at)
            try:
                open_state(job.out, job.errors, files, restart=True).close()
            except Crash:
                files.crash(loss, Random(at))
            else:
                assert at > 5
                return
            try:
                job.run(FILES)
            except StateError:  # nothing is lost by asking once more
                open_state(job.out, job.errors, FILES, restart=True).close()
                job.run(FILES)
            found = job.final()
            assert {name: found[name] for name in wanted.final()} == wanted.final()


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config, cache = tmp_path / "w", tmp_path / "c", tmp_path / "hashes.json"
    weights.write_bytes(b"weights")
    config.write_bytes(b"config")
    first = hash_files([weights, config], cache, FILES)
    assert list(first) == ["c", "w"] and len(first["w"]) == 64
    read: list[str] = []
    hashed = state_module._hash
    monkeypatch.setattr(state_module, "_hash", lambda path: read.append(path.name) or hashed(path))
    assert hash_files([weights, config], cache, FILES) == first and read == []
    weights.write_bytes(b"weighty")
    assert hash_files([weights, config], cache, FILES)["w"] != first["w"] and read == ["w"]
    cache.write_bytes(b"{damaged")
    assert hash_files([config], cache, FILES)["c"] == first["c"] and read == ["w", "c"]
