"""From what the user asked to everything a job stands on: model folder, words, input, locked state, manifest.

It must not plan, start an engine, or load a tensor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from shoal import __version__
from shoal.core.errors import ModelError, UsageError
from shoal.jobs.answer import AnswerWriter
from shoal.jobs.devices import kind_of
from shoal.jobs.encode import RowEncoder
from shoal.jobs.feed import Feed, Known
from shoal.jobs.files import Files
from shoal.jobs.options import STDIN, VLLM, JobOptions
from shoal.jobs.part import parts_of
from shoal.jobs.passing import Passing, parse_passed
from shoal.jobs.passing_encode import PassingEncoder
from shoal.jobs.plan import Plan
from shoal.jobs.prompt import PromptTemplate
from shoal.jobs.read import Source
from shoal.jobs.replies import ReplyPart, ReplyWriter
from shoal.jobs.settings import JobSettings, parse_defaults
from shoal.jobs.spool import open_source
from shoal.jobs.state import HASHES, Begin, Manifest, StateFolder, hash_files, open_state
from shoal.jobs.tables import Form, form_of
from shoal.remote.vllm import Installed, find
from shoal.text.chat import ChatTemplate
from shoal.text.checkpoint import ModelInfo, kv_mode, resolve_model, weight_mode
from shoal.text.pooling import read_pooling
from shoal.text.tokenizer import Tokenizer

EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ARITHMETIC = ("kernels", "nn", "runtime", "text")  # packages that decide a token
LIBRARIES = ("torch", "numpy", "tokenizers", "jinja2", "llguidance")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job ready to be planned. Close `state` and `source` when done."""

    options: JobOptions
    errors: Path | None  # None: failed lines go into the output
    form: Form
    state: StateFolder
    begin: Begin
    manifest: Manifest
    source: Source
    words: Words | ServedWords
    vllm: Installed | None = None  # which is to be started for it

    @property
    def name(self) -> str:
        """Of the model."""
        return self.words.name

    def writer(self) -> AnswerWriter | ReplyWriter:
        """What makes lines of answers."""
        decided, shown = self.manifest.answers, self.options.openai
        if isinstance(self.words, Words):
            return self.words.writer(decided, shown)
        return ReplyWriter(decided, shown)

    def feed(self, plan: Plan, done: Callable[[int], bool], known: Known | None, engines: int = 1) -> Feed:
        """What hands out the rows of a plan to so many engines."""
        part = parts_of(self.words.tokenizer) if isinstance(self.words, Words) else ReplyPart
        return Feed(plan, self.source, self.words.encoder, part, done, known, engines)


def errors_path(output: Path) -> Path:
    """Where failed lines go: o.errors.jsonl for o.jsonl, o.csv or o.parquet."""
    stem = output.with_suffix("") if output.suffix in (".jsonl", ".csv", ".parquet", ".pq", ".json") else output
    return stem.with_name(stem.name + ".errors.jsonl")


@dataclass(frozen=True, slots=True)
class Words:
    """A model as far as reading a file needs it: no weights."""

    folder: Path
    name: str
    tokenizer: Tokenizer
    info: ModelInfo
    encoder: RowEncoder

    def writer(self, decided: str, shown: bool) -> AnswerWriter:
        """What makes lines of answers, for which `decided` stands; those of plain rows as requests' where `shown`."""
        return AnswerWriter(self.tokenizer, decided, self.name, created(), shown, self.encoder.style, self.info.head)


@dataclass(frozen=True, slots=True)
class ServedWords:
    """A model that servers have: its name, if the job says it, and no words but the rows'."""

    name: str
    encoder: PassingEncoder
    folder: Path | None = None  # where a server that is started for the job finds it


def open_served(options: JobOptions) -> ServedWords:
    """What reads the lines of a job that servers answer."""
    folder = resolve_model(options.model) if options.starts_vllm else None
    name = options.model or (folder.name if folder is not None else "")
    settings = JobSettings(
        model=name,
        strict=options.strict,
        prompt=None if options.prompt is None else PromptTemplate.parse(options.prompt),
        chat=options.chat,
        passing=Passing(name, folder is not None, parse_passed(options.body)),
    )
    return ServedWords(name, PassingEncoder(settings, options.servers), folder)


def open_words(options: JobOptions) -> Words:
    """What turns the lines of a job into tokens, or into reasons why not; for a run, and for whoever foretells one."""
    folder = resolve_model(options.model)
    tokenizer = Tokenizer.load(folder)
    info = ModelInfo.load(folder, tokenizer)
    name = options.model or folder.name
    settings = JobSettings(
        model=name,
        strict=options.strict,
        adapters=tuple(options.adapter),
        seed=options.seed,
        prompt=None if options.prompt is None else PromptTemplate.parse(options.prompt),
        chat=options.chat,
        defaults=parse_defaults(options.body, options.adapter),
    )
    _check_adapters(options, name)
    return Words(folder, name, tokenizer, info, RowEncoder(tokenizer, ChatTemplate.load(folder), info, settings))


def prepare(options: JobOptions, files: Files) -> Prepared:
    """Check and open everything. ShoalErrors say what is wrong before anything was changed, the lock apart."""
    vllm = find(os.environ, options.engine().device) if options.starts_vllm else None
    words = open_served(options) if options.servers else open_words(options)
    form = form_of(options.output)
    errors = None if options.one_file and form == "jsonl" else errors_path(options.output)
    _check_input(options, errors)
    state = open_state(options.output, errors, files, restart=options.restart, overwrite=options.overwrite)
    opened = False
    try:
        source = open_source(options.input, state.path, files, sys.stdin.buffer)
        if isinstance(words, Words):
            manifest = make_manifest(options, state.path, files, words, source.fingerprint)
        else:
            manifest = _served_manifest(options, state.path, files, words, source.fingerprint, vllm)
        begin = state.begin(manifest)
        opened = True
    finally:
        if not opened:
            state.close()
    return Prepared(options, errors, form, state, begin, manifest, source, words, vllm)


def created() -> int:
    """The time in answers, the same for all runs of a job: SOURCE_DATE_EPOCH, or 0."""
    said = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not said.isdecimal():
        raise UsageError(f"SOURCE_DATE_EPOCH is {said!r}: it must be a whole number of seconds")
    return int(said)


def _check_adapters(options: JobOptions, model: str) -> None:
    """Refuse what is no adapter's folder before anything is locked; the engine looks at what is in the files."""
    for name, folder in options.adapter.items():
        if name == model:
            raise UsageError(f"--adapter {name}: this is the model's own name: give the adapter another")
        for file in ADAPTER:
            if not (Path(folder).expanduser() / file).is_file():
                raise ModelError(
                    f"--adapter {name}: {folder} has no {file}: give a folder that peft's save_pretrained() wrote"
                )


def _check_input(options: JobOptions, errors: Path | None) -> None:
    """Refuse an input that cannot be read, or that the job would write over, before anything is forgotten for it."""
    if options.input == STDIN:
        return
    if options.input.exists() and not options.input.is_file():
        raise UsageError(f"{options.input} is not a file: a pipe is read with --input -, for it is read once only")
    try:
        with options.input.open("rb"):
            pass
        for output in (options.output, errors):
            if output is not None and output.exists() and output.samefile(options.input):
                raise UsageError(f"{options.input} is the input, and this job would write to it: choose another output")
    except OSError as error:
        raise UsageError(f"cannot read {options.input}: {error.strerror}") from error


def make_manifest(options: JobOptions, state: Path, files: Files, words: Words, fingerprint: str) -> Manifest:
    """All that the answers depend on. In the folder `state` the hashes of large files are kept for the next time."""
    folder, encoder = words.folder, words.encoder
    model = [
        path for pattern in ("*.safetensors", "config.json", "generation_config.json") for path in folder.glob(pattern)
    ]
    hashes = hash_files(model, state / HASHES, files)
    if encoder.model.vector:
        pooling = hash_files(read_pooling(folder, encoder.model.encoder).files, state / HASHES, files)
        hashes |= {f"pooling {name}": digest for name, digest in pooling.items()}
    template = encoder.template.hash if encoder.template is not None else ""
    weights = weight_mode(options.weights, folder)
    return Manifest(
        input=fingerprint,
        model=hashes,
        tokenizer=encoder.tokenizer.hash,
        template=template,
        parameters=_parameters(options)
        | {
            "model": encoder.settings.model,
            "seed": options.seed,
            "context": encoder.model.context,
            "created": created(),
        },
        weight_mode=weights,
        kv_mode=kv_mode(options.kv, weights),
        adapters={name: _adapter_hash(Path(each), state, files) for name, each in options.adapter.items()},
        instruction_set=f"{kind_of(options.device)} {os.environ.get('SHOAL_ISA') or instruction_set()}",
        versions={"shoal": __version__, "arithmetic": arithmetic(), **{name: version(name) for name in LIBRARIES}},
        layout=_layout(options),
    )


def _served_manifest(
    options: JobOptions, state: Path, files: Files, words: ServedWords, fingerprint: str, vllm: Installed | None
) -> Manifest:
    """Of a job that servers answer: what is asked is known, and by what it is answered they alone know, unless one is
    started for it. Their addresses may change before the job has ended."""
    asked = _parameters(options) | {"model": options.model, "endpoint": True}
    if vllm is None or words.folder is None:
        return Manifest(fingerprint, {}, "", "", asked, "", "", "", {}, layout=_layout(options))
    small = (path for pattern in ("*.json", "*.jinja", "*.txt", "*.model") for path in words.folder.glob(pattern))
    hashes = hash_files([*words.folder.glob("*.safetensors"), *small], state / HASHES, files)
    weights = "fp32" if weight_mode(options.weights, words.folder) == "fp32" else options.weights
    return Manifest(
        fingerprint, hashes, "", "", asked | {"model": words.name, "endpoint": VLLM}, weights, "", "",
        {VLLM: vllm.version}, layout=_layout(options),
    )  # fmt: skip


def _parameters(options: JobOptions) -> dict[str, object]:
    return {
        "strict": options.strict,
        "prompt": options.prompt,
        "chat": options.chat,
        "body": {name: value for name, value in options.body.items() if name != "timeout"},
        "openai": options.openai,
    }


def _layout(options: JobOptions) -> dict[str, object]:
    return {"order": options.order.value, "one_file": options.one_file}


def _adapter_hash(folder: Path, state: Path, files: Files) -> str:
    """One hash over the files of an adapter."""
    hashes = hash_files([folder.expanduser() / name for name in ADAPTER], state / HASHES, files)
    return hashlib.sha256("".join(hashes[name] for name in ADAPTER).encode()).hexdigest()


def arithmetic() -> str:
    """One hash over the code that computes, compiled and not: two builds of a version may differ."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for name in ARITHMETIC for path in (package / name).glob("*")):
        if path.suffix in (".py", ".so"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def instruction_set() -> str:
    """The processor's architecture with the extensions that arithmetic may use, as /proc/cpuinfo has them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        words = set()  # not Linux: the architecture alone has to do
    return " ".join([platform.machine(), *(name for name in EXTENSIONS if name in words)])
