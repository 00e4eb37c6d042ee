"""Proof: planning costs under 2 % of a real run, GSM8K with the 387M-parameter random model of ../shared/bench.

The whole command is measured as a user runs it. A question is answered with as many tokens as the data set's own
answer to it has.
Usage: python -m benchmarks.prove_planning [ROWS]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import workloads
from benchmarks.common import ROOT, SHARED, write_result
from shoal.text.tokenizer import Tokenizer

LIMIT = 0.02


def model(name: str = "qwen05b") -> Path:
    """The random-weight checkpoint, made once under build/."""
    folder = ROOT / "build" / "bench-models"
    if not (folder / name / "model.safetensors").exists():
        subprocess.run([sys.executable, str(SHARED / "bench" / "make_models.py"), str(folder)], check=True)
    return folder / name


def main() -> int:
    """Run the command and compare its own account of planning with the whole."""
    tokenizer = Tokenizer.load(model())
    lengths = [len(tokenizer.encode(answer)) for answer in workloads.gsm8k_answers()]
    rows = list(zip(workloads.gsm8k(), lengths, strict=True))[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workloads.write_rows(folder / "in.jsonl", rows)
        command = ["run", "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", str(model())]
        code = subprocess.run([sys.executable, "-m", "shoal", *command], check=False).returncode
        report = json.loads((folder / "out.jsonl.shoal" / "report.json").read_text())
    seconds, tokens = report["seconds"], report["tokens"]
    for name in ("model", "input", "output", "files"):  # paths of this machine
        report.pop(name)
    share = seconds["plan"] / seconds["wall"]
    computed = tokens["prompt_computed"] == tokens["prompt_bound"]
    holds = code == 0 and share < LIMIT and computed and report["rows"]["ok"] == len(rows)
    print(f"{len(rows)} rows: planning {seconds['plan']:.1f} s of {seconds['wall']:.0f} s = {100 * share:.2f} %")
    if len(sys.argv) == 1:
        write_result("planning", {"rows": len(rows), "share": share, "report": report, "shown": holds})
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
