"""The words of the command line: every flag that commands share, the file of --config, and exit codes.

It must not know what any command does with them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml
from typer.core import TyperOption

from shoal.core.errors import ShoalError
from shoal.core.printable import printable
from shoal.jobs.options import Order

INTERRUPTED = 5


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the flags' defaults from a YAML file. A key that is no flag of the command is an error."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold lines of the form flag_name: value")
    known = {str(each.name) for each in ctx.command.params if isinstance(each, TyperOption) and each.name != "config"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            raise typer.BadParameter(f"{path} has the unknown key {key!r}{hint}")
    for parameter in ctx.command.params:
        given = values.get(parameter.name)
        if getattr(parameter, "multiple", False) and given is not None:
            pairs = [f"{name}={value}" for name, value in given.items()] if isinstance(given, dict) else given
            values[parameter.name] = [pairs] if isinstance(pairs, str) else pairs
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


Input = Annotated[Path, typer.Option("--input", "-i", help="Rows: JSONL, CSV or Parquet; - is standard input.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Answers, in input order; run again to continue.")]
Model = Annotated[str, typer.Option(help="Folder or hub id; without it, the small model that ships in the package.")]
Adapter = Annotated[
    list[str] | None, typer.Option(metavar="NAME=FOLDER", help="LoRA adapter for rows whose model is NAME; repeatable.")
]
Prompt = Annotated[str | None, typer.Option(help="Prompt of plain rows over their columns: 'Summarize: {text}'.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put plain rows through the model's chat template.")]
Body = Annotated[str, typer.Option(help="Request fields for rows that lack them, as JSON: '{\"max_tokens\": 64}'.")]
OrderFlag = Annotated[Order, typer.Option(help="plan: share most; input: as the file has them; finish: write at once.")]
Memory = Annotated[str | None, typer.Option(help="Memory for keys and values: 2GB, 512MiB. Without it, what is free.")]
StepTokens = Annotated[int | None, typer.Option(help="Most tokens in one step of the model.")]
Device = Annotated[
    str,
    typer.Option("--device", "--devices", help="Where the model runs: cpu, cuda, cuda:N; 0,1: an engine on each part."),
]
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL[,URL...]", help="Servers of the OpenAI API that answer in place of an engine."),
]
Engine = Annotated[str, typer.Option(help="Whose engine: shoal, or vllm, started for the job where it is installed.")]
Weights = Annotated[
    str, typer.Option(help="Weights: fp32, bf16, int8[+head], int4[+head], int4-a16; auto: as the checkpoint.")
]
KV = Annotated[
    str, typer.Option("--kv", "--kv-cache-dtype", help="Keys and values: int8 takes half the memory of auto.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of each engine. Without it, one for each core.")]
Seed = Annotated[int, typer.Option(help="Decides the seed of rows that bring none.")]
MaxFailures = Annotated[str | None, typer.Option(help="End the job after so many failed lines: 100 or 1%.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="A malformed line ends the job; a row that names another model fails.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an earlier run has answered.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that no job of ours has written.")]
OpenAI = Annotated[bool, typer.Option("--openai", help="Write plain rows in the OpenAI batch shape too.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of answers, kept for every later job that asks the same.")]
Verify = Annotated[str, typer.Option(help="Share of the answers to compute again and compare at the end: 1%.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Config = Annotated[
    Path | None, typer.Option(is_eager=True, callback=read_config, help="YAML file with flag_name: value.")
]
WORKLOAD = "d1, d2, d3, sharegpt, fixed:PROMPT:ANSWER, ...; or a trace: Azure, Mooncake, Vidur, ServeGen, tau-bench."
Rows = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Rows, as run takes them; - is standard input.")]
RowsFlag = Annotated[Path | None, typer.Option("--input", "-i", help="The same, as run has it.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with pictures here.")]
Price = Annotated[float | None, typer.Option(help="What an hour of this machine costs.")]
MillionPrices = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="What a server asks for a million tokens in and out: 0.15,0.60.")
]
Watts = Annotated[float | None, typer.Option(help="What this machine takes while it works.")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn our own errors, and an interruption, into a message and an exit code."""
    try:
        yield
    except ShoalError as error:
        typer.echo(f"shoal: {printable(str(error), lines=True)}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as interruption:
        typer.echo("shoal: interrupted; run the same command again and it continues", err=True)
        raise typer.Exit(INTERRUPTED) from interruption
