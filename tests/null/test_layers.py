"""The import graph against the table of allowed edges, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shoal"

TENSOR_FREE = {"core", "kv", "sched", "engine", "sim"}
JOB_SIDE = {"core", "engine", "text", "models", "client", "remote"}
EVERYTHING = {"core", "kv", "sched", "engine", "kernels", "nn", "runtime", "text", "models"}

# layer -> the layers of shoal it may import, itself apart. Imports go down only.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "kv": {"core"},
    "sched": {"core", "kv"},
    "engine": {"core", "kv", "sched"},
    "sim": {"core", "kv", "sched", "engine"},
    "kernels": set(),
    "nn": {"core", "kernels"},
    "runtime": {"core", "kernels", "nn"},
    "text": {"core"},
    "models": set(),
    "build": EVERYTHING,
    "host": {"core", "engine", "build", "client"},
    "client": {"core", "engine"},
    "remote": {"core", "client"},
    "jobs": JOB_SIDE,
    "llm": EVERYTHING | {"build", "jobs"},
    "bench": EVERYTHING | {"build", "client", "host", "jobs"},
    "show": {"core", "text", "jobs"},
    "preview": {"core", "client", "sched", "engine", "sim", "runtime", "text", "jobs", "show"},
    "what_if": {"core", "sched", "engine", "sim", "jobs", "preview", "show"},
    "call": {"core", "jobs", "preview"},
    "flags": {"core", "jobs"},
    "cli": {"core", "flags", "models", "jobs", "bench", "preview", "show", "what_if"},
    "__main__": {"cli"},
    "__init__": {"core", "call", "jobs", "llm", "preview"},
}

# layer -> packages from outside it may import, the standard library apart.
OUTSIDE: dict[str, set[str]] = {
    "core": set(),
    "kv": set(),
    "sched": {"numpy"},
    "engine": set(),
    "sim": {"numpy"},
    "kernels": {"torch", "triton"},
    "nn": {"torch", "numpy", "safetensors"},
    "runtime": {"torch", "numpy", "psutil"},
    "text": {"tokenizers", "llguidance", "jinja2", "markupsafe", "msgspec", "numpy", "huggingface_hub"},
    "models": set(),
    "build": {"torch", "psutil", "numpy"},
    "host": {"torch", "msgspec", "psutil"},
    "client": {"msgspec", "psutil"},
    "remote": {"httpx2", "msgspec", "numpy"},
    "jobs": {"numpy", "msgspec", "pyarrow", "rich", "psutil", "jinja2"},
    "llm": {"torch", "numpy", "rich"},
    "bench": {"torch", "numpy"},
    "show": {"numpy", "msgspec", "rich"},
    "preview": {"numpy", "msgspec", "rich"},
    "what_if": {"numpy", "rich"},
    "call": set(),
    "flags": {"typer", "yaml"},
    "cli": {"typer", "rich"},
    "__main__": set(),
    "__init__": set(),
}

CLOCKS = {"time", "datetime"}  # the tensor-free half is told the time; it never reads it


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if layer_of(p) != "ext")


def package_of(path: Path) -> list[str]:
    return ["shoal", *path.relative_to(PACKAGE).parts[:-1]]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that `path` imports anywhere, by statement or by `import_module("…")`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package_of(path)
            base = parts[: len(parts) - node.level + 1] if node.level else []
            full = ".".join([*base, node.module] if node.module else base)
            names |= {f"{full}.{alias.name}" for alias in node.names} if full == "shoal" else {full}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                names.add(str(node.args[0].value))
    return names


def edges() -> list[tuple[Path, str, str]]:
    """(file, its layer, imported dotted name)"""
    return [(path, layer_of(path), name) for path in modules() for name in sorted(imported(path))]


def test_every_layer_is_in_the_table() -> None:
    known = set(MAY_IMPORT)
    assert {layer_of(path) for path in modules()} <= known
    assert set(OUTSIDE) == known


def test_imports_inside_shoal_go_down() -> None:
    wrong = []
    for path, layer, name in edges():
        parts = name.split(".")
        if parts[0] != "shoal" or parts[1:] in ([], ["__version__"]):
            continue
        target = parts[1]
        if target != layer and target not in MAY_IMPORT[layer]:
            wrong.append(f"{path.relative_to(ROOT)}: {layer} -> {target}")
    assert not wrong, wrong


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {layer for layer, below in MAY_IMPORT.items() if layer not in done and below <= done}
        assert ready, f"a circle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_packages_from_outside_stay_where_they_belong() -> None:
    wrong = []
    for path, layer, name in edges():
        top = name.split(".")[0]
        if top == "shoal" or top in sys.stdlib_module_names or top in OUTSIDE[layer]:
            continue
        wrong.append(f"{path.relative_to(ROOT)}: {layer} imports {name}")
    assert not wrong, wrong


def test_the_tensor_free_half_never_reads_a_clock() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, layer, name in edges()
        if layer in TENSOR_FREE and name.split(".")[0] in CLOCKS
    ]
    assert not wrong, wrong


def test_every_module_of_ours_that_is_imported_exists() -> None:
    """Also by what needs a package that may not be here, so that nothing else would tell."""
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in sorted(imported(path))
        if name.startswith("shoal.") and not exists(name)
    ]
    assert not missing, missing


def exists(name: str) -> bool:
    """Whether this is a module of ours, or what the package itself gives by that name."""
    place = ROOT.joinpath(*name.split("."))
    if place.is_dir() or place.with_suffix(".py").is_file() or name == "shoal.kernels._cpu":
        return True
    given = ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    names = {node.id for node in given if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return name.count(".") == 1 and name.split(".")[1] in names


def test_nobody_imports_ext() -> None:
    assert not [str(path) for path, _, name in edges() if name.startswith("shoal.ext")]


def test_the_walk_sees_imports_inside_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "kv").mkdir()
    file = tmp_path / "kv" / "pool.py"
    file.write_text(
        "def f():\n    import torch\n    from . import tree\n    from ..sched.policy import P\n"
        "    from shoal import run\n    import importlib\n    importlib.import_module('shoal.nn')\n"
    )
    assert imported(file) == {"torch", "shoal.kv", "shoal.sched.policy", "shoal.run", "importlib", "shoal.nn"}


def without_torch(code: str) -> None:
    check = "import sys; bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TORCH_FREE_FOLDERS = ("core", "kv", "sched", "sim", "jobs", "text", "show", "preview", "remote", "what_if")


@pytest.mark.parametrize("folder", TORCH_FREE_FOLDERS)
def test_importing_it_leaves_torch_out(folder: str) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
    ]
    without_torch("\n".join(f"import {name}" for name in names))


def test_help_leaves_torch_out() -> None:
    without_torch(
        "import sys\nsys.argv = ['shoal', 'run', '--help']\n"
        "from shoal.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
