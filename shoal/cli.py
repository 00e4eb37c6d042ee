"""The command line: every command, and the options that its flags become.

It must not know how a job is run, and never loads torch.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup, TyperOption

from shoal import __version__, flags
from shoal.core.config import parse_bytes
from shoal.flags import exit_codes
from shoal.jobs.bill import parse_prices
from shoal.jobs.options import FailureBudget, JobOptions, Order, parse_adapters, parse_body, parse_share, place_of

if TYPE_CHECKING:
    from shoal.jobs.retry import Again

PREFIX = "SHOAL_"

app = typer.Typer(
    name="shoal",
    no_args_is_help=True,
    add_completion=False,
    help="Large batches of model work on your own hardware. Every flag is also SHOAL_FLAG_NAME in the environment "
    "and flag_name: in the file of --config; the command line wins.",
)


def answer(options: JobOptions, again: Again | None = None) -> int:
    """Run the job; its exit code."""
    from shoal.jobs.run import run_job  # here, so that --help and report need not load what a job needs
    from shoal.preview.foresee import Foreseer

    return run_job(options, again=again, seer=Foreseer())


@app.command()
def run(
    input: flags.Input,
    output: flags.Output,
    model: flags.Model = "",
    adapter: flags.Adapter = None,
    prompt: flags.Prompt = None,
    chat: flags.Chat = False,
    body: flags.Body = "{}",
    order: flags.OrderFlag = Order.PLAN,
    memory: flags.Memory = None,
    step_tokens: flags.StepTokens = None,
    device: flags.Device = "cpu",
    endpoint: flags.Endpoint = None,
    engine: flags.Engine = "shoal",
    weights: flags.Weights = "auto",
    kv: flags.KV = "auto",
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    max_failures: flags.MaxFailures = None,
    strict: flags.Strict = False,
    restart: flags.Restart = False,
    overwrite: flags.Overwrite = False,
    openai: flags.OpenAI = False,
    cache: flags.Cache = None,
    verify: flags.Verify = "0%",
    quiet: flags.Quiet = False,
    config: flags.Config = None,
) -> None:
    """Answer every line of a file. Run it again and it continues where it stopped."""
    with exit_codes():
        options = JobOptions(
            input=input,
            output=output,
            model=model,
            adapter=parse_adapters(adapter or ()),
            prompt=prompt,
            chat=chat,
            body=parse_body(body),
            order=order,
            memory=None if memory is None else parse_bytes(memory),
            step_tokens=step_tokens,
            device=place_of(device, endpoint, engine),
            weights=weights,
            kv=kv,
            threads=threads,
            seed=seed,
            max_failures=FailureBudget() if max_failures is None else FailureBudget.parse(max_failures),
            strict=strict,
            restart=restart,
            overwrite=overwrite,
            openai=openai,
            cache=cache,
            verify=parse_share(verify),
            quiet=quiet,
        )
        raise typer.Exit(answer(options))


@app.command("run-batch")
def run_batch(
    input: Annotated[Path, typer.Option("--input-file", "--input", "-i", help="Rows in the OpenAI batch shape.")],
    output: Annotated[Path, typer.Option("--output-file", "--output", "-o", help="Answers and errors, one file.")],
    model: Annotated[str, typer.Option(help="Folder or hub id; the rows must name it.")],
    config: flags.Config = None,
) -> None:
    """As run, with the flags and the one output file of vLLM's command of that name."""
    with exit_codes():
        raise typer.Exit(answer(JobOptions(input=input, output=output, model=model, strict=True, one_file=True)))


@app.command()
def retry(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output file of a job, or its state folder.")],
    every: Annotated[bool, typer.Option("--all", help="Run lines again too that failed by their own fault.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds a row may run, of rows that do not say.")] = None,
    memory: flags.Memory = None,
    quiet: flags.Quiet = False,
) -> None:
    """Run the failed rows of a job again, and put what comes of them into both its files."""
    from shoal.jobs.look import output_of  # here, so that --help stays quick
    from shoal.jobs.retry import retry_job

    with exit_codes():
        change: dict[str, object] = {"quiet": quiet}
        if memory is not None:
            change["memory"] = parse_bytes(memory)
        raise typer.Exit(retry_job(output_of(output), every, change, timeout, answer, Console(stderr=True)))


@app.command()
def report(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output file of a job, or its state folder.")],
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    html: flags.Html = None,
    price_per_hour: flags.Price = None,
    price_per_million: flags.MillionPrices = None,
    watts: flags.Watts = None,
) -> None:
    """Say what has happened in a job, also while it runs, with counts that add up."""
    from shoal.jobs.look import output_of  # here, so that --help stays quick
    from shoal.show.command import run_report

    with exit_codes():
        prices = parse_prices(price_per_million)
        raise typer.Exit(run_report(output_of(output), html, json, price_per_hour, watts, Console(), prices))


@app.command()
def top(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The output file of a job, or its state folder.")],
    once: Annotated[bool, typer.Option("--once", help="Print one picture and leave; without a terminal too.")] = False,
) -> None:
    """Watch a job while it runs, from any terminal that sees its folder; q leaves, and changes nothing."""
    from shoal.jobs.look import output_of  # here, so that --help stays quick
    from shoal.show.top import run_top

    with exit_codes():
        raise typer.Exit(run_top(output_of(output), once, Console()))


def typed(ctx: typer.Context, name: str) -> bool:
    """Whether a flag is on the command line itself, not in the environment or a file."""
    return getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"


@app.command()
def explain(
    ctx: typer.Context,
    file: flags.Rows = None,
    input: flags.RowsFlag = None,
    model: flags.Model = "",
    adapter: flags.Adapter = None,
    prompt: flags.Prompt = None,
    chat: flags.Chat = False,
    body: flags.Body = "{}",
    endpoint: flags.Endpoint = None,
    memory: flags.Memory = None,
    step_tokens: flags.StepTokens = None,
    weights: flags.Weights = "auto",
    kv: flags.KV = "auto",
    threads: flags.Threads = None,
    strict: flags.Strict = False,
    answer_tokens: Annotated[int | None, typer.Option(help="Tokens to expect of answers that end anywhere.")] = None,
    sample: Annotated[int | None, typer.Option(help="Rows to run first, to learn how long answers are.")] = None,
    price_per_hour: flags.Price = None,
    price_per_million: flags.MillionPrices = None,
    watts: flags.Watts = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine again.")] = False,
    html: flags.Html = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config: flags.Config = None,
) -> None:
    """Say what a file will do before it is run: rows, what they share, memory, time. Only --sample needs weights."""
    from shoal.preview.command import run_explain  # here, so that --help stays quick
    from shoal.preview.options import ExplainOptions, rows_of

    with exit_codes():
        job = JobOptions(
            input=rows_of(file, input, typed(ctx, "input")),
            output=Path(os.devnull),  # nothing is answered
            model=model,
            adapter=parse_adapters(adapter or ()),
            prompt=prompt,
            chat=chat,
            body=parse_body(body),
            device=place_of("cpu", endpoint),
            memory=None if memory is None else parse_bytes(memory),
            step_tokens=step_tokens,
            weights=weights,
            kv=kv,
            threads=threads,
            strict=strict,
        )
        options = ExplainOptions(job, html, answer_tokens, price_per_hour, watts, calibrate, sample)
        run_explain(options, json, Console(), parse_prices(price_per_million))


@app.command()
def lint(
    ctx: typer.Context,
    file: flags.Rows = None,
    input: flags.RowsFlag = None,
    model: flags.Model = "",
    adapter: flags.Adapter = None,
    prompt: flags.Prompt = None,
    chat: flags.Chat = False,
    body: flags.Body = "{}",
    endpoint: flags.Endpoint = None,
    strict: flags.Strict = False,
    fix: Annotated[Path | None, typer.Option(help="Write the file here with the repairs that are safe.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with every line.")] = False,
    config: flags.Config = None,
) -> None:
    """Check every line of a file as run would, without the model's weights; 3 when some would fail."""
    from shoal.preview.command import run_lint  # here, so that --help stays quick
    from shoal.preview.options import rows_of

    with exit_codes():
        job = JobOptions(
            input=rows_of(file, input, typed(ctx, "input")),
            output=Path(os.devnull),  # nothing is answered
            model=model,
            adapter=parse_adapters(adapter or ()),
            prompt=prompt,
            chat=chat,
            body=parse_body(body),
            device=place_of("cpu", endpoint),
            strict=strict,
        )
        raise typer.Exit(run_lint(job, fix, json, Console()))


@app.command()
def sim(
    ctx: typer.Context,
    workload: Annotated[str, typer.Argument(metavar="[LAW|TRACE]", help=flags.WORKLOAD)] = "",
    input: Annotated[Path | None, typer.Option("--input", "-i", help="A job's rows, in place of a law.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", metavar="OUT", help="A job that has run, again.")] = None,
    policy: Annotated[
        str, typer.Option(help="Name, or module:Class; name:setting=2 sets it. first-come; of jobs batch.")
    ] = "",
    compare: Annotated[str, typer.Option(help="Policies on the same requests: first-come,batch.")] = "",
    hardware: Annotated[str, typer.Option(help="a100, h100, h200, a40, a6000, cpu.")] = "h100",
    model: Annotated[
        str, typer.Option(help="A known shape as llama-3-8b, or a folder with config.json.")
    ] = "llama-3-8b",
    tensor: Annotated[int, typer.Option(help="Devices that share each layer.")] = 1,
    pipeline: Annotated[int, typer.Option(help="Such groups that follow each other.")] = 1,
    instances: Annotated[int, typer.Option(help="Engines beside each other.")] = 1,
    place: Annotated[str, typer.Option(help="Where requests go: round-robin, shortest-queue, ...")] = "least-work",
    arrivals: Annotated[str | None, typer.Option(help="poisson:2, gamma:2:4, closed:64, trace, trace:2, once.")] = None,
    requests: Annotated[int | None, typer.Option(help="How many; all of a trace without it.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Memory of an engine, in place of what has room.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Most tokens in one step; each policy has its own.")] = None,
    first: Annotated[float, typer.Option(help="Seconds promised to the first token.")] = math.inf,
    gap: Annotated[float, typer.Option(help="Seconds promised between tokens.")] = math.inf,
    deadline: Annotated[float, typer.Option(help="Seconds promised for whole answers.")] = math.inf,
    capacity: Annotated[bool, typer.Option("--capacity", help="Find the highest rate that keeps the gap.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs with other draws, for means and intervals.")] = 1,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    html: flags.Html = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config: flags.Config = None,
) -> None:
    """Say how a law, a trace or a job would fare on machines that need not be here, by the scheduler that serves."""
    from shoal.jobs.look import output_of  # here, so that --help stays quick
    from shoal.what_if.command import run_sim
    from shoal.what_if.options import SimOptions

    with exit_codes():
        if (workload or from_) and not typed(ctx, "input"):
            input = None  # the environment's is of other commands
        job = None if input is None else JobOptions(input=input, output=Path(os.devnull))
        options = SimOptions(
            workload, job, None if from_ is None else output_of(from_),
            tuple(filter(None, (compare or policy).split(","))), hardware, model, tensor, pipeline, instances, place,
            arrivals, requests, kv_tokens, step_tokens, first, gap, deadline, seeds, seed, capacity, html,
        )  # fmt: skip
        run_sim(options, json, Console())


@app.command()
def cache(
    folder: Annotated[Path, typer.Argument(help="The folder that was given to --cache.")],
    keep: Annotated[str | None, typer.Option(help="Remove what was not used for longest, down to 5GB, 200MiB.")] = None,
) -> None:
    """Say what a cache of answers holds, and make it smaller."""
    from shoal.jobs.cache import look, prune  # here, so that --help stays quick
    from shoal.jobs.units import count, size

    with exit_codes():
        found = look(folder) if keep is None else prune(folder, parse_bytes(keep))
        typer.echo(
            f"{count(found.entries)} answers, {size(found.size)}; "
            f"the one not used for longest was {count(found.oldest)} days ago"
        )


@app.command()
def bench(
    what: Annotated[list[str] | None, typer.Argument(help="W1 W2 W3 W4, or kernels; all workloads without it.")] = None,
    model: flags.Model = "",
    weights: Annotated[str, typer.Option(help="auto, bf16, int8, int4, ..., or several by turns: bf16,int8.")] = "auto",
    scale: Annotated[float, typer.Option(help="Share of each workload's rows.")] = 1.0,
    threads: flags.Threads = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each workload; the median counts.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    peer: Annotated[str, typer.Option(help='Alternate with vllm,openvino,llamacpp; "vllm:--mnbt 8192" sets it.')] = "",
    memory: flags.Memory = None,
    step_tokens: flags.StepTokens = None,
) -> None:
    """Measure this machine and the engine on it, against its limits and against other engines."""
    from shoal.bench.options import BenchOptions  # here, so that other commands need not load what this one needs

    with exit_codes():
        options = BenchOptions(
            what=tuple(what or ()),
            model=model,
            weights=tuple(filter(None, weights.split(","))),
            scale=scale,
            threads=threads,
            runs=runs,
            json=json,
            peers=tuple(filter(None, peer.split(","))),
            memory=None if memory is None else parse_bytes(memory),
            step_tokens=step_tokens,
        )
        options.settle_environment()  # before torch is loaded
        from shoal.bench.command import run_bench

        raise typer.Exit(run_bench(options))


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=show_version, help="Version.")] = False,
) -> None:
    """Hold what all commands share."""


def build_command() -> TyperGroup:
    """The commands, with every flag readable from the environment under its own name."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for command in group.commands.values():
        for parameter in command.params:
            if isinstance(parameter, TyperOption) and parameter.name:
                parameter.envvar = PREFIX + parameter.name.upper().rstrip("_")
                parameter.show_envvar = False
    return group


def main() -> None:
    """Run the command line and leave with the exit codes of the README."""
    build_command()(prog_name="shoal")
